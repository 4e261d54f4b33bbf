// ReLU and ReLU6 with the mask of their gradient.

namespace qatfast::cpu {
namespace {

// Zeros keep their sign; a NaN stays and passes the gradient.
template <class T>
void relu_loop(const T* x, T* y, uint8_t* mask, int64_t n, opmath_type<T> limit) {
  using C = opmath_type<T>;
  const V<C> zero = {}, most = zero + limit;
  std::memset(mask, 0, (n + 7) / 8);
  map<T, T, C, Result::any>(x, y, n, [&](V<C> v, int64_t i, int64_t m) __attribute__((always_inline)) {
    store_bits<lanes<C>>(mask, i, bits_of_lanes<mask_t<C>, lanes<C>>(~((v <= zero) | (v >= most))), m);
    const V<C> above = v < zero ? zero : v;
    return above > most ? most : above;
  });
}

} // namespace
} // namespace qatfast::cpu
