// Memory for results.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdlib>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace qatfast {

// From this size on, page faults dominate the cost of fresh memory.
constexpr size_t large_bytes = size_t{8} << 20;

// From this size on, glibc's initial threshold, results may go back to the kernel when they are freed, in every step.
constexpr size_t returned_bytes = size_t{128} << 10;

// Lets glibc keep up to 64 MB of freed memory, as it does once a program has freed a block of this size: it adapts its
// thresholds to the largest block that was freed. Forward and backward of a moving average of 255 Ki elements take 85
// us then, and 320 before.
inline bool keep_freed_memory() {
#ifdef __GLIBC__
  void* volatile block = std::malloc((size_t{32} << 20) - 65536); // volatile: compilers remove an unused pair
  std::free(block);
#endif
  return true;
}

// Asks for large pages before a large fresh CPU tensor is first written: the kernel then clears 2 MB per page fault
// instead of 4 KB, which makes the first write of 100 MB three times as fast. madvise is a hint; failure is ignored.
// The first result that is not small lets glibc keep freed memory.
inline const at::Tensor& with_few_page_faults(const at::Tensor& fresh) {
  if (fresh.is_cpu() && fresh.nbytes() >= returned_bytes) {
    [[maybe_unused]] static const bool is_kept = keep_freed_memory();
  }
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  if (fresh.is_cpu() && fresh.nbytes() >= large_bytes) {
    const auto address = reinterpret_cast<uintptr_t>(fresh.const_data_ptr());
    const auto begin = (address + page - 1) / page * page, end = (address + fresh.nbytes()) / page * page;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return fresh;
}

// A fresh tensor on the device of `like`. On the CPU it skips the dispatcher, which takes longer than a small layer's
// loops.
inline at::Tensor fresh(at::IntArrayRef sizes, at::ScalarType dtype, const at::Tensor& like) {
  return with_few_page_faults(
      like.is_cpu() ? at::Tensor(at::detail::empty_cpu(sizes, dtype)) : at::empty(sizes, like.options().dtype(dtype)));
}

// A contiguous tensor in the memory of another, from `byte` on, which takes a fifth of the time of a fresh one. It must
// not leave the call: the results of an operator share no memory.
inline at::Tensor within(const at::Tensor& memory, int64_t byte, at::IntArrayRef sizes, at::ScalarType dtype) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(memory.storage()), memory.key_set(), c10::scalarTypeToTypeMeta(dtype));
  result.unsafeGetTensorImpl()->set_storage_offset(byte / static_cast<int64_t>(c10::elementSize(dtype)));
  result.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return result;
}

} // namespace qatfast
