"""Measuring: interleaved timing, bandwidth, random weights of public shapes, peers, records."""
