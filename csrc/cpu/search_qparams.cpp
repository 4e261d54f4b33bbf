#include "cpu/launch.h"
#include "cpu/sum.h"

namespace qatfast::cpu {
namespace {

constexpr int64_t factors = 80;
constexpr int64_t piece = sum_chunk * sum_chunk; // elements whose chunks' sums form one chunk

// The errors of all grids over a piece of a block.
template <class T>
void errors_of_piece(const T* x, int64_t n, const Grids<opmath_type<T>>& grids, double* errors, int64_t stride) {
  std::vector<double> sums(factors * sum_chunk);
  const auto chunks = chunks_of(n);
  chosen().loops<T>().squared_errors(x, n, grids, factors, sums.data(), chunks);
  for (int64_t i = 0; i < factors; ++i) {
    errors[i * stride] = ordered_sum(sums.data() + i * chunks, chunks);
  }
}

} // namespace

void search_qparams(const at::Tensor& x, const QuantSpec& spec, const at::Tensor& scale, const at::Tensor& zero_point) {
  const auto rows = x.size(0), n = x.size(1), pieces = (n + piece - 1) / piece;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "search_qparams", [&] {
    using C = opmath_type<scalar_t>;
    const auto& loops = chosen().loops<scalar_t>();
    const auto range = spec.quant_range<C>();
    const auto* from = x.const_data_ptr<scalar_t>();
    auto* best_scale = scale.mutable_data_ptr<C>();
    auto* best_zero_point = zero_point.mutable_data_ptr<int32_t>();
    const auto candidates_of = [&](int64_t row, C* scales, int32_t* zero_points) {
      C lo = 0, hi = 0, los[factors], his[factors];
      loops.range(from + row * n, n, &lo, &hi);
      for (int64_t i = 0; i < factors; ++i) { // the largest factor first
        const C factor = static_cast<C>(factors - i) / factors;
        los[i] = lo * factor;
        his[i] = hi * factor;
      }
      loops.choose(los, his, factors, range, scales, zero_points);
    };
    const auto take_best = [&](int64_t row, const C* scales, const int32_t* zero_points, const double* errors) {
      const auto best = std::min_element(errors, errors + factors) - errors;
      best_scale[row] = scales[best];
      best_zero_point[row] = zero_points[best];
    };
    if (pieces <= 1) {
      parallel_for(
          0, rows, std::max<int64_t>(1, grain / (factors * std::max<int64_t>(n, 1))), [&](int64_t begin, int64_t end) {
            for (; begin < end; ++begin) {
              C scales[factors];
              int32_t zero_points[factors];
              double errors[factors];
              candidates_of(begin, scales, zero_points);
              errors_of_piece(from + begin * n, n, {scales, zero_points, range.quant_min, range.quant_max}, errors, 1);
              take_best(begin, scales, zero_points, errors);
            }
          });
      return;
    }
    for (int64_t row = 0; row < rows; ++row) {
      C scales[factors];
      int32_t zero_points[factors];
      std::vector<double> errors(factors * pieces);
      parallel_for(0, 1, 1, [&](int64_t, int64_t) {
        candidates_of(row, scales, zero_points);
      });
      parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
        for (; begin < end; ++begin) {
          errors_of_piece(from + row * n + begin * piece, std::min(piece, n - begin * piece),
              {scales, zero_points, range.quant_min, range.quant_max}, errors.data() + begin, pieces);
        }
      });
      double totals[factors];
      for (int64_t i = 0; i < factors; ++i) {
        totals[i] = ordered_sum(errors.data() + i * pieces, pieces);
      }
      take_best(row, scales, zero_points, totals);
    }
  });
}

} // namespace qatfast::cpu
