// Tries divide() against IEEE division on every pair of 24-bit significands whose quotient comes within 9 units of 1/S
// of a midpoint between two floats, S being the divisor's significand; elsewhere its last rounding cannot go wrong:
// what it rounds is off by at most 3 units in the last place (of the first product) times 2^-23 (of remainder and
// reciprocal).
#include "common/quant_math.h"

#include <cstdio>

namespace {

constexpr int64_t least = 1 << 23, past = 1 << 24; // the significands as integers

// a * inverse(a, m) = 1 modulo m, for odd m
int64_t inverse(int64_t a, int64_t m) {
  int64_t r = m, next_r = a % m, t = 0, next_t = 1;
  while (next_r != 0) {
    const int64_t quotient = r / next_r;
    r = std::exchange(next_r, r - quotient * next_r);
    t = std::exchange(next_t, t - quotient * next_t);
  }
  return ((t % m) + m) % m;
}

} // namespace

int main() {
  int64_t tried = 0, wrong = 0;
  for (int64_t s = least; s < past; ++s) {
    const int64_t common = s & -s; // of s and any large power of 2
    const int64_t odd = s / common;
    for (const int shift : {24, 25}) { // x / s in [1, 2) or [1/2, 1): its midpoints are odd multiples of 2^-shift
      const int64_t power = int64_t{1} << shift;
      const int64_t inverse_power = inverse(power / common % odd, odd);
      for (int64_t off = -9; off <= 9; ++off) { // x * 2^shift = midpoint * s + off
        if (off == 0 || off % common != 0) {
          continue;
        }
        int64_t x = ((off / common % odd + odd) % odd) * inverse_power % odd;
        for (x += (least - x + odd - 1) / odd * odd; x < past; x += odd) {
          const bool is_midpoint = ((x * power - off) / s) % 2 != 0;
          if (!is_midpoint || (x >= s) != (shift == 24)) {
            continue;
          }
          const auto a = static_cast<float>(x), b = static_cast<float>(s);
          ++tried;
          wrong += qatfast::divide(a, b, 1 / b) != a / b;
        }
      }
    }
  }
  std::printf("%lld tried, %lld wrong\n", static_cast<long long>(tried), static_cast<long long>(wrong));
  return wrong != 0;
}
