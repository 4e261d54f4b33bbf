// Moves a stored range by that of a tensor, in one launch without a host sync. A CTA, or a team of them, finds the
// range of a block; the last one of a team to finish moves the stored range. Bound by memory: one read per element.
#include "cuda/dynamic_quantize.cuh"
#include "cuda/launch.h"
#include "cuda/static_quantize.cuh"

#include <algorithm>

namespace qatfast::cuda {
namespace {

constexpr int observe_threads = 256;
constexpr int64_t elements_per_thread = 16; // from which on another thread pays

// What the CTAs of a team have found of their block, from zeros on.
template <class C>
struct TeamRange {
  RangeKeys<C> keys;
  unsigned int has_finite;
  unsigned int finished; // CTAs
};

// `counted` is 0 before the launch, and 1 once a block has counted the batch.
struct StoredRanges {
  float* running_min;
  float* running_max;
  int64_t* num_batches;
  float constant;
  unsigned int* counted;

  // Moves the range of a block, by one thread. Returns the range that quantizes the batch.
  template <class C>
  __device__ __forceinline__ Range<C> move(int64_t block, const RangeKeys<C>& batch, bool has_finite) const {
    float &low = running_min[block], &high = running_max[block];
    const float batch_low = stored_end(C(0) - bits_as<C>(batch.below)),
                batch_high = stored_end(bits_as<C>(batch.above));
    const bool is_new = is_new_range(low, high);
    const Range<C> range{is_new ? batch_low : low, is_new ? batch_high : high};
    if (has_finite) {
      low = is_new ? batch_low : moved_end(low, batch_low, widen_lo(low, batch_low), constant);
      high = is_new ? batch_high : moved_end(high, batch_high, widen_hi(high, batch_high), constant);
      if (atomicExch(counted, 1) == 0) {
        ++*num_batches;
      }
    }
    return range;
  }
};

template <class T>
__global__ void __launch_bounds__(observe_threads)
    observe_range_kernel(const T* x, Layout layout, int64_t team, TeamRange<opmath_type<T>>* teams, StoredRanges stored,
        QuantRange<int32_t> quant_range, opmath_type<T>* scale, int32_t* zero_point) {
  using C = opmath_type<T>;
  constexpr int ahead = 8; // loads in flight
  __shared__ RangeKeys<C> shared;
  const int64_t size = layout.outer * layout.inner;
  for (int64_t item = blockIdx.x; item < layout.blocks * team; item += gridDim.x) {
    const auto block = item / team, member = item % team;
    const BlockElements elements{layout, block};
    const int64_t end = size / team * (member + 1) + (member + 1 == team ? size % team : 0);
    Range<C> range;
    bool finds_finite = false;
    for (int64_t i = size / team * member + threadIdx.x; i < end; i += ahead * int64_t{blockDim.x}) {
      T values[ahead];
#pragma unroll
      for (int k = 0; k < ahead; ++k) {
        values[k] = i + k * int64_t{blockDim.x} < end ? x[elements.at(i + k * int64_t{blockDim.x})] : T(NAN);
      }
#pragma unroll
      for (int k = 0; k < ahead; ++k) {
        const C value = static_cast<C>(values[k]);
        range.widen_by(finite_or_zero(value));
        finds_finite |= value - value == 0;
      }
    }
    if (threadIdx.x == 0) {
      shared = {};
    }
    const bool has_finite = __syncthreads_or(finds_finite);
    const auto of_warp = range.keys().of_warp();
    if (threadIdx.x % 32 == 0) {
      of_warp.widen_atomically(&shared);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      RangeKeys<C> keys = shared;
      bool is_finite = has_finite, is_last = true;
      if (team > 1) {
        auto& all = teams[block];
        keys.widen_atomically(&all.keys);
        atomicOr(&all.has_finite, static_cast<unsigned int>(has_finite));
        __threadfence();
        is_last = atomicAdd(&all.finished, 1) == team - 1;
        __threadfence();
        if (is_last) { // atomics read what others wrote past the caches
          keys = {atomicMax(&all.keys.below, 0), atomicMax(&all.keys.above, 0)};
          is_finite = atomicOr(&all.has_finite, 0) != 0;
        }
      }
      if (is_last) {
        const BlockGrid<C> block_grid(stored.move(block, keys, is_finite).keys(), quant_range);
        scale[block] = block_grid.grid.scale;
        zero_point[block] = block_grid.zero_point;
      }
    }
    __syncthreads(); // before the next block's range
  }
}

} // namespace

void observe_range(const at::Tensor& x, const QuantSpec& spec, const ObservedRange& range, const at::Tensor& scale,
    const at::Tensor& zero_point) {
  const auto layout = layout_of(x, spec.granularity);
  if (layout.blocks == 0) {
    return;
  }
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto device = x.device().index();
  const auto size = layout.outer * layout.inner;
  const int threads = size <= 32 * elements_per_thread * 2 ? 32 : observe_threads;
  const auto resident = resident_ctas(threads, device);
  const auto team =
      std::clamp<int64_t>(size / (threads * elements_per_thread), 1, std::max<int64_t>(1, resident / layout.blocks));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "observe_range", [&] {
    using C = opmath_type<scalar_t>;
    using Team = TeamRange<C>;
    // The flag `counted`, and the teams.
    const auto bytes = static_cast<int64_t>(sizeof(Team)) * (1 + (team > 1 ? layout.blocks : 0));
    const auto workspace = x.new_empty({bytes}, at::kByte); // freed in stream order
    C10_CUDA_CHECK(cudaMemsetAsync(workspace.mutable_data_ptr(), 0, bytes, stream));
    auto* teams = static_cast<Team*>(workspace.mutable_data_ptr()) + 1;
    const StoredRanges stored{range.running_min.mutable_data_ptr<float>(), range.running_max.mutable_data_ptr<float>(),
        range.num_batches.mutable_data_ptr<int64_t>(), range.averaging_constant,
        static_cast<unsigned int*>(workspace.mutable_data_ptr())};
    const auto ctas = static_cast<unsigned>(std::min(layout.blocks * team, resident));
    observe_range_kernel<scalar_t><<<ctas, threads, 0, stream>>>(x.const_data_ptr<scalar_t>(), layout, team, teams,
        stored, spec.quant_range<int32_t>(), scale.mutable_data_ptr<C>(), zero_point.mutable_data_ptr<int32_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

} // namespace qatfast::cuda
