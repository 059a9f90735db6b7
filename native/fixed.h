// Dot products of quantised rows by the byte multiplications of AVX-512 VNNI: 64 values an instruction, where floats
// take one for 16 and as many more to unpack them.
//
// Bytes multiply bytes, so an input is written in two: as 16-bit multiples of a scale that its line of 64 shares. That
// holds it to 2^-16 of the largest value of the line; bfloat16 would hold it to 2^-9 of its own. Levels are unsigned
// there (0 .. 15, 0 .. 255), and what that adds is taken off again by the sum of the inputs.
//
// Included by quantized.h.

// Inputs in digits. A span is what has one scale in a row: a line, or with groups of 32 the half of one.
struct FixedInputs {
  int64_t lines, spans;  // spans are a multiple of a vector's lanes: those past the lines are zero
  const int8_t *high, *low;  // (count, lines, 64)
  const float *scales, *sums;  // (count, spans): what a digit is worth, and the sum of the inputs

  FixedInputs(int64_t n, int64_t spans_per_line, const float* const* x, int64_t count)
      : lines(ceil_div(n, kLine)), spans(ceil_div(lines * spans_per_line, Vec::kLanes) * Vec::kLanes) {
    int8_t* digits = scratch<int8_t, 5>(2 * count * lines * kLine);
    float* floats = scratch<float, 5>(2 * count * spans);
    high = digits, low = digits + count * lines * kLine;
    scales = floats, sums = floats + count * spans;
    std::fill_n(floats, 2 * count * spans, 0.0f);
    for (int64_t b = 0; b < count; ++b)
      for (int64_t l = 0; l < lines; ++l) {
        const float* line = x[b] + l * kLine;
        float tail[kLine] = {}, halves[2];
        if ((l + 1) * kLine > n) {
          std::copy_n(line, n - l * kLine, tail);
          line = tail;
        }
        const int64_t at = (b * lines + l) * kLine;
        const float scale = to_digits(line, digits + at, digits + count * lines * kLine + at, halves);
        float* to = floats + b * spans + l * spans_per_line;
        for (int64_t h = 0; h < spans_per_line; ++h) {
          to[h] = scale;
          to[count * spans + h] = spans_per_line == 2 ? halves[h] : halves[0] + halves[1];
        }
      }
  }

  Bytes first_digits(int64_t b, int64_t l) const { return load_bytes(high + (b * lines + l) * kLine); }
  Bytes second_digits(int64_t b, int64_t l) const { return load_bytes(low + (b * lines + l) * kLine); }
};
