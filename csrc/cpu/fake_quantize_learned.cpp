#include "cpu/launch.h"
#include "cpu/sum.h"

namespace qatfast::cpu {

void fake_quantize_learned(const at::Tensor& from, const at::Tensor& to, const QParams& qparams, Layout layout) {
  fake_quantize_affine(from, to, /*mask=*/{}, qparams, layout);
}

void fake_quantize_learned_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
    const QParams& qparams, Layout layout, const at::Tensor& grad_x, const at::Tensor& grad_scale) {
  const auto rows = layout.blocks, n = layout.inner, chunks = chunks_of(n);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "fake_quantize_learned", [&] {
    const auto loop = chosen().loops<scalar_t>().learned_gradients;
    using C = opmath_type<scalar_t>;
    const auto grids = grids_of<C>(qparams);
    const auto* from = x.const_data_ptr<scalar_t>();
    const auto* dy = grad.const_data_ptr<scalar_t>();
    auto* dx = grad_x.mutable_data_ptr<scalar_t>();
    std::vector<double> chunk_sums(rows * chunks, 0.0);
    // A task is some chunks of a row.
    constexpr int64_t task_chunks = grain / sum_chunk;
    const auto tasks_per_row = (chunks + task_chunks - 1) / task_chunks;
    const auto at_once = std::max<int64_t>(1, task_chunks / chunks);
    parallel_for(0, rows * tasks_per_row, at_once, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) {
        const auto row = begin / tasks_per_row, chunk = begin % tasks_per_row * task_chunks;
        const auto first = chunk * sum_chunk, offset = row * n + first;
        loop(from + offset, dy + offset, dx + offset, std::min(n - first, task_chunks * sum_chunk), grids.from(row),
            chunk_sums.data() + row * chunks + chunk);
      }
    });
    const StandardArithmetic arithmetic;
    const auto* signs = scale.const_data_ptr<C>();
    const auto* zero_points = qparams.zero_point.const_data_ptr<int32_t>();
    auto* ds = grad_scale.mutable_data_ptr<C>();
    for (int64_t row = 0; row < rows; ++row) {
      const auto total = ordered_sum(chunk_sums.data() + row * chunks, chunks);
      ds[row] = learned_scale_gradient(total, n, qparams.quant_max - zero_points[row], signs[row]);
    }
  });
}

} // namespace qatfast::cpu
