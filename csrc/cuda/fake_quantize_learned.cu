// The gradients of a learned scale and of its input. A warp owns a chunk of a block (sum.cuh) at a time. Bound by
// memory: two reads and one write per element.
//
//   whole blocks   one launch: a block has at most one chunk, which a warp sums, or few enough for a CTA
//   split blocks   two launches: the chunks' sums of all blocks, then their sums
#include "cuda/launch.h"
#include "cuda/static_quantize.cuh"
#include "cuda/sum.cuh"

namespace qatfast::cuda {
namespace {

constexpr int learned_threads = 256;
constexpr int learned_warps = learned_threads / 32;
// Chunks of a block that its CTA sums: at most so many, but a few only if there are too few blocks to fill the device.
constexpr int most_chunks = 512, few_chunks = 4 * learned_warps;

template <class C>
struct ScaleGradients {
  StaticGrids<C> grids;
  const C* scale;
  C* grad_scale;
  int64_t size;   // elements of a block
  double* sums;   // of split blocks: [block][chunk at every level]
  int64_t stride; // of a block in `sums`

  __device__ __forceinline__ void write(int64_t block, double sum) const {
    const auto levels = static_cast<int64_t>(grids.quant_max) - grids.zero_point[block];
    grad_scale[block] = learned_scale_gradient(sum, size, levels, scale[block]);
  }
};

// Stores the gradients of a chunk's elements. Returns its sum, in every lane of the warp.
template <class T>
__device__ __forceinline__ double sum_of_chunk(
    const T* grad, const T* x, T* grad_x, const ScaleGradients<opmath_type<T>>& to, int64_t block, int64_t chunk) {
  using C = opmath_type<T>;
  constexpr int ahead = sizeof(T) == 8 ? 2 : 8; // rows in flight
  const BlockElements elements{to.grids.layout, block};
  const int64_t first = chunk * sum_chunk + threadIdx.x % 32;
  double sum = 0;
  const auto grid = to.grids.grid_of(block);
  for (int64_t row = first; row - first < sum_chunk && row < to.size; row += ahead * sum_lanes) {
    T values[ahead], upstream[ahead];
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      if (row + k * sum_lanes < to.size) {
        const auto at = elements.at(row + k * sum_lanes);
        values[k] = x[at];
        upstream[k] = grad[at];
      }
    }
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      if (row + k * sum_lanes < to.size) {
        const auto [product, inside] = learned_gradient(static_cast<C>(values[k]), static_cast<C>(upstream[k]), grid);
        grad_x[elements.at(row + k * sum_lanes)] = inside ? upstream[k] : T(0);
        sum += static_cast<double>(product);
      }
    }
  }
  return sum_of_lanes(sum);
}

// A CTA sums a block.
template <class T>
__global__ void __launch_bounds__(learned_threads)
    fake_quantize_learned_blocks_kernel(const T* grad, const T* x, T* grad_x, ScaleGradients<opmath_type<T>> to) {
  __shared__ double sums[most_chunks + 1];
  const auto chunks = chunks_of(to.size);
  for (int64_t block = blockIdx.x; block < to.grids.layout.blocks; block += gridDim.x) {
    for (int64_t chunk = threadIdx.x / 32; chunk < chunks; chunk += learned_warps) {
      const double sum = sum_of_chunk(grad, x, grad_x, to, block, chunk);
      if (threadIdx.x % 32 == 0) {
        sums[chunk] = sum;
      }
    }
    __syncthreads();
    const double total = ordered_sum(sums, chunks);
    if (threadIdx.x == 0) {
      to.write(block, total);
    }
    __syncthreads(); // before the next block's sums
  }
}

// A warp sums a chunk, which is a block if there is no room for sums. Warps of a CTA have neighbouring blocks: where
// the elements of blocks alternate in memory, they share its lines.
template <class T>
__global__ void __launch_bounds__(learned_threads)
    fake_quantize_learned_chunks_kernel(const T* grad, const T* x, T* grad_x, ScaleGradients<opmath_type<T>> to) {
  const auto blocks = to.grids.layout.blocks, chunks = chunks_of(to.size);
  const bool by_chunk = to.grids.layout.outer == 1; // neighbours in memory are chunks of a block
  const int64_t warps = int64_t{gridDim.x} * learned_warps;
  for (int64_t i = int64_t{blockIdx.x} * learned_warps + threadIdx.x / 32; i < blocks * chunks; i += warps) {
    const auto block = by_chunk ? i / chunks : i % blocks, chunk = by_chunk ? i % chunks : i / blocks;
    const double sum = sum_of_chunk(grad, x, grad_x, to, block, chunk);
    if (threadIdx.x % 32 == 0) {
      if (to.sums) {
        to.sums[block * to.stride + chunk] = sum;
      } else {
        to.write(block, sum);
      }
    }
  }
}

// A CTA sums the chunks' sums of a block.
template <class C>
__global__ void __launch_bounds__(learned_threads) fake_quantize_learned_sums_kernel(ScaleGradients<C> to) {
  for (int64_t block = blockIdx.x; block < to.grids.layout.blocks; block += gridDim.x) {
    const double total = ordered_sum(to.sums + block * to.stride, chunks_of(to.size));
    if (threadIdx.x == 0) {
      to.write(block, total);
    }
  }
}

} // namespace

void fake_quantize_learned_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& scale,
    const QParams& qparams, Layout layout, const at::Tensor& grad_x, const at::Tensor& grad_scale) {
  const c10::cuda::CUDAGuard guard(x.device());
  const auto device = x.device().index();
  const auto size = layout.outer * layout.inner, chunks = chunks_of(size);
  const bool whole = chunks <= most_chunks &&
      (chunks <= few_chunks || layout.blocks >= attribute(cudaDevAttrMultiProcessorCount, device));
  at::Tensor sums; // freed in stream order
  const auto stride = count_of_sums(chunks);
  if (!whole) {
    sums = x.new_empty({layout.blocks * stride}, at::kDouble);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "fake_quantize_learned", [&] {
    using T = scalar_t;
    using C = opmath_type<T>;
    ScaleGradients<C> to{grids_of<C>(qparams, layout), scale.const_data_ptr<C>(), grad_scale.mutable_data_ptr<C>(),
        size, whole ? nullptr : sums.mutable_data_ptr<double>(), stride};
    to.grids.learned = true;
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const bool by_cta = whole && chunks > 1;
    const auto kernel = by_cta ? fake_quantize_learned_blocks_kernel<T> : fake_quantize_learned_chunks_kernel<T>;
    const auto threads = layout.blocks * (by_cta ? learned_threads : 32 * chunks);
    kernel<<<ctas_for(threads, learned_threads, device), learned_threads, 0, stream>>>(
        grad.const_data_ptr<T>(), x.const_data_ptr<T>(), grad_x.mutable_data_ptr<T>(), to);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (!whole) {
      fake_quantize_learned_sums_kernel<C>
          <<<ctas_for(layout.blocks * learned_threads, learned_threads, device), learned_threads, 0, stream>>>(to);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
}

} // namespace qatfast::cuda
