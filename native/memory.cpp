#include "memory.h"

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

namespace dejavu {
namespace {

// Random rows miss the TLB on nearly every 4 KB page; on 2 MB pages they don't.
constexpr size_t kHuge = size_t{2} << 20;
size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

}  // namespace

void* allocate(size_t bytes) {
#if defined(__linux__)
  if (bytes >= kHuge) {
    // Map one huge page more than needed, and give back what lies outside the aligned part.
    const size_t size = round_up(bytes, kHuge);
    void* map = mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) throw std::bad_alloc();
    const auto start = reinterpret_cast<uintptr_t>(map), aligned = round_up(start, kHuge);
    if (aligned > start) munmap(map, aligned - start);
    if (start + kHuge > aligned) munmap(reinterpret_cast<void*>(aligned + size), start + kHuge - aligned);
    madvise(reinterpret_cast<void*>(aligned), size, MADV_HUGEPAGE);  // advice: without it, small pages
    return reinterpret_cast<void*>(aligned);
  }
#endif
  void* p = std::aligned_alloc(64, round_up(bytes ? bytes : 1, 64));
  if (!p) throw std::bad_alloc();
  return p;
}

void release(void* p, size_t bytes) {
#if defined(__linux__)
  if (bytes >= kHuge) {
    munmap(p, round_up(bytes, kHuge));
    return;
  }
#else
  (void)bytes;
#endif
  std::free(p);
}

}  // namespace dejavu
