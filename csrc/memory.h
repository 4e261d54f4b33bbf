// Fresh memory for large results.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace qatfast {

// From here on pages are what fresh memory costs.
constexpr size_t large_bytes = size_t{8} << 20;

// Asks for large pages before a large fresh CPU tensor is first written: the kernel then clears 2 MB at a page fault
// in place of 4 KB, which makes the first write of 100 MB three times as fast. It is a wish: a refusal changes nothing.
inline const at::Tensor& with_large_pages(const at::Tensor& fresh) {
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

// On the device of `like`; on the CPU without the dispatcher, which takes longer than a small layer's loops.
inline at::Tensor fresh(at::IntArrayRef sizes, at::ScalarType dtype, const at::Tensor& like) {
  return with_large_pages(
      like.is_cpu() ? at::Tensor(at::detail::empty_cpu(sizes, dtype)) : at::empty(sizes, like.options().dtype(dtype)));
}

// A contiguous tensor in the memory of another, from `byte` on, in a fifth of the time of a fresh one. It stays inside
// the call: what an operator returns shares no memory.
inline at::Tensor within(const at::Tensor& memory, int64_t byte, at::IntArrayRef sizes, at::ScalarType dtype) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(memory.storage()), memory.key_set(), c10::scalarTypeToTypeMeta(dtype));
  result.unsafeGetTensorImpl()->set_storage_offset(byte / static_cast<int64_t>(c10::elementSize(dtype)));
  result.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return result;
}

} // namespace qatfast
