// A number that is kept in half the memory: the upper half of a float32. Kernels read and write it, and compute in float.

#pragma once

#include <cstdint>
#include <cstring>

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  // Rounded to the nearest, ties to even; NaN stays NaN. Without branches, so that loops become vectors.
  explicit BFloat16(float x) {
    uint32_t word;
    std::memcpy(&word, &x, sizeof(word));
    const uint32_t rounded = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    bits = uint16_t(x == x ? rounded : 0x7fc0);
  }
  explicit operator float() const {
    const uint32_t word = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &word, sizeof(x));
    return x;
  }
};
