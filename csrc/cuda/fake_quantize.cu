#include "cuda/dynamic_quantize.cuh"
#include "cuda/dynamic_quantize.h"
#include "cuda/launch.h"

#include <array>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace qatfast::cuda {
namespace {

// QATFAST_CUDA_COOPERATIVE=0 replaces the grid barrier by two launches, as on a device without cooperative launches.
bool barrier_is_wanted() {
  const auto* value = std::getenv("QATFAST_CUDA_COOPERATIVE");
  return !value || std::string(value) != "0";
}

template <class T, class Units>
DeviceLimits measured_limits(int device) {
  const auto kernel = fake_quantize_kernel<T, Units, false>;
  cudaFuncAttributes attributes;
  C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  DeviceLimits limits;
  limits.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  limits.shared_memory =
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - static_cast<int64_t>(attributes.sharedSizeBytes);
  limits.cooperative = attribute(cudaDevAttrCooperativeLaunch, device) != 0;
  C10_CUDA_CHECK(cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limits.shared_memory)));
  int per_multiprocessor = 0;
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &per_multiprocessor, kernel, max_threads, static_cast<size_t>(limits.shared_memory)));
  limits.resident = limits.multiprocessors * std::max(per_multiprocessor, 1);
  return limits;
}

// The limits of the current device, which are queried once.
template <class T, class Units>
DeviceLimits limits_of(int device) {
  static std::mutex mutex;
  static std::vector<std::optional<DeviceLimits>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.size() <= static_cast<size_t>(device)) {
    known.resize(device + 1);
  }
  if (!known[device]) {
    known[device] = measured_limits<T, Units>(device);
  }
  auto limits = *known[device];
  limits.cooperative = limits.cooperative && barrier_is_wanted();
  return limits;
}

template <class T>
KernelTask kernel_task(const DynamicTask& task, const Plan& plan) {
  const auto distance = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16;
  };
  const void* from = task.from.const_data_ptr();
  void* to = task.to.defined() ? task.to.mutable_data_ptr() : nullptr;
  return {plan, from, to, task.scale.defined() ? task.scale.mutable_data_ptr() : nullptr,
      task.zero_point.defined() ? task.zero_point.mutable_data_ptr<int32_t>() : nullptr, nullptr,
      task.spec.quant_range<int32_t>(), distance(from) == distance(to)};
}

// The kernel that holds everything in registers is compiled for whole units only: for others it would double the code
// for odd sizes.
template <class T, class Units>
const void* kernel_for(bool all_held) {
  if constexpr (std::is_same_v<Units, WholeUnits<T>>) {
    if (all_held) {
      return reinterpret_cast<const void*>(fake_quantize_kernel<T, Units, true>);
    }
  }
  return reinterpret_cast<const void*>(fake_quantize_kernel<T, Units, false>);
}

// Whether every block is a run of whole 16-byte windows, and few enough for an int.
template <class T>
bool has_whole_units(const DynamicTask& task) {
  const auto layout = layout_of(task.from, task.spec.granularity);
  return layout.outer == 1 && layout.inner % lanes<T> == 0 && layout.inner / lanes<T> < 1 << 30 &&
      is_aligned(task.from.const_data_ptr(), 16) && (!task.to.defined() || is_aligned(task.to.const_data_ptr(), 16));
}

template <class T, class Units>
void launch(c10::ArrayRef<DynamicTask> tasks) {
  const auto& first = tasks[0];
  const auto device = first.from.device().index();
  const auto limits = limits_of<T, Units>(device);
  const auto shape = [&](size_t i) {
    const auto& x = tasks[i].from;
    const auto skipped = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 / sizeof(T);
    return Shape{layout_of(x, tasks[i].spec.granularity), sizeof(T), static_cast<int64_t>(skipped)};
  };
  std::array<Plan, 2> plans;
  if (tasks.size() == 2) {
    plans = plan_of_two({shape(0), shape(1)}, limits);
  } else {
    plans[0] = plan_of(shape(0), first.to.defined(), limits);
  }
  KernelLaunch launch{};
  launch.second = plans[0].grid;
  launch.barrier = plans[0].barrier;
  for (size_t i = 0; i < tasks.size(); ++i) {
    launch.tasks[i] = kernel_task<T>(tasks[i], plans[i]);
  }
  at::Tensor partials; // freed in stream order
  if (plans[0].team > 1) {
    using C = opmath_type<T>;
    partials = first.from.new_empty({plans[0].partials()}, c10::CppTypeToScalarType<C>::value);
    launch.tasks[0].partials = partials.mutable_data_ptr();
  }
  const auto* kernel = kernel_for<T, Units>(plans[0].all_held && (tasks.size() == 1 || plans[1].all_held));
  const auto run = [&](Phases phases, int64_t grid) {
    launch.phases = phases;
    void* arguments[] = {&launch};
    const dim3 blocks(static_cast<unsigned>(grid)), threads(plans[0].threads);
    const auto shared = static_cast<size_t>(plans[0].shared_bytes);
    const auto stream = c10::cuda::getCurrentCUDAStream(device);
    C10_CUDA_CHECK(launch.barrier ? cudaLaunchCooperativeKernel(kernel, blocks, threads, arguments, shared, stream)
                                  : cudaLaunchKernel(kernel, blocks, threads, arguments, shared, stream));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (plans[0].launches() == 1) {
    run(both, plans[0].grid + plans[1].grid);
  } else {
    run(range, plans[0].grid + plans[1].grid);
    run(apply, plans[0].grid);
  }
}

} // namespace

void launch_dynamic_quantize(c10::ArrayRef<DynamicTask> tasks) {
  const c10::cuda::CUDAGuard guard(tasks[0].from.device());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, tasks[0].from.scalar_type(), "fake_quantize", [&] {
    std::all_of(tasks.begin(), tasks.end(), has_whole_units<scalar_t>) ? launch<scalar_t, WholeUnits<scalar_t>>(tasks)
                                                                       : launch<scalar_t, BlockUnits<scalar_t>>(tasks);
  });
}

void fake_quantize(const FakeQuantizeTask& task) {
  if (task.from.numel() > 0) {
    launch_dynamic_quantize(DynamicTask{task.from, task.to, task.spec, {}, {}});
  }
}

} // namespace qatfast::cuda
