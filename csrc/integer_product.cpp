#include "integer_product.h"

#include "copy.h"
#include "cpu/arithmetic.h"
#include "memory.h"
#include "specs.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/_int_mm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <omp.h>

#include <atomic>
#include <memory>

namespace qatfast {
namespace {

using at::Tensor;

constexpr int64_t int32_features = 33025; // 255 * 255 times as many fit in 32 bits
constexpr int64_t float_features = 1024;  // -128 * -128 times as many are 2^24: float32 holds all integers up to there
constexpr int64_t slice = 65536;          // -128 * -128 times as many, too, even if a library shifts one of them by 128
constexpr int64_t small_work = 1 << 22;   // multiplications; fewer take less time than to wake another thread
constexpr int64_t packing_rows = 32;      // that many rows take the time in which the library packs the weight
constexpr int64_t least_rows = 512;       // below, a product spends its time on packing the weight again
// Of products that become outputs at a time: on the CPU they are still in cache then; on a GPU one product is the
// fastest, and this bounds the memory.
constexpr int64_t cpu_block_bytes = 8 << 20, cuda_block_bytes = 256 << 20;

// While it lives, the library's parallel loops that this thread begins stay on it.
class OneThread {
 public:
  explicit OneThread(bool is_wanted) : before_(omp_get_max_threads()) {
    if (is_wanted) {
      omp_set_num_threads(1);
    }
  }
  ~OneThread() {
    omp_set_num_threads(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  const int before_;
};

// products = x @ weight.T in float32, whose sums of so few products are exact in any order, and are so with factors
// rounded to bfloat16 too, as torch.set_float32_matmul_precision may have it.
void multiply_in_floats(const Tensor& products, const Tensor& x, const Tensor& weight) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset); // it would round the sums
  const auto features = x.size(1);
  for (int64_t begin = 0; begin < features; begin += float_features) {
    const auto count = std::min(float_features, features - begin);
    const auto some = [&](const Tensor& matrix) {
      return matrix.narrow(1, begin, count).to(at::kFloat);
    };
    const auto sums = at::mm(some(x), some(weight).t());
    begin == 0 ? products.copy_(sums) : products.add_(sums.to(at::kInt));
  }
}

// products = x @ weight.T by the library
void multiply_by_library(Tensor products, const Tensor& x, const Tensor& weight) {
  // of one column, the transpose has strides that oneDNN takes for others
  at::_int_mm_out(products, x, x.size(1) == 1 ? weight.view({1, weight.size(0)}) : weight.t());
}

// cuBLASLt wants more than 16 rows, and multiples of 8 elsewhere.
void multiply_padded(const Tensor& products, const Tensor& x, const Tensor& weight) {
  const auto missing = [](int64_t size) {
    return (8 - size % 8) % 8;
  };
  const auto rows = x.size(0), outputs = weight.size(0);
  const auto more_rows = std::max<int64_t>(0, 17 - rows);
  const auto more_features = missing(x.size(1)), more_outputs = missing(outputs);
  if (more_rows + more_features + more_outputs == 0) {
    return multiply_by_library(products, x, weight);
  }
  const auto result = at::_int_mm(at::constant_pad_nd(x, {0, more_features, 0, more_rows}),
      at::constant_pad_nd(weight, {0, more_features, 0, more_outputs}).t());
  products.copy_(result.narrow(0, 0, rows).narrow(1, 0, outputs));
}

// Whether the library multiplies the largest integers exactly: on processors without VNNI it adds pairs of products in
// 16 bits, which saturates at any size of two columns or more. The last size has sums that no float32 holds.
bool is_exact(int64_t rows, int64_t features) {
  for (const int left : {-128, 127}) {
    for (const int right : {-128, 127}) {
      const auto x = at::full({rows, features}, left, at::kChar);
      const auto weight = at::full({48, features}, right, at::kChar);
      if (!at::_int_mm(x, weight.t()).eq(left * right * features).all().item<bool>()) {
        return false;
      }
    }
  }
  return true;
}

// Whether oneDNN may serve this product. torch.backends.mkldnn.enabled is asked at each call: without it torch takes a
// loop of its own, which is exact, so that what it gives proves nothing of oneDNN, and slow.
bool is_exact_on_cpu() {
  const auto uses_library = [] {
    return at::globalContext().userEnabledMkldnn();
  };
  static std::atomic<int> proved{-1}; // 1: it is exact, 0: it is not, -1: not known
  if (!uses_library()) {
    return false;
  }
  if (proved < 0) {
    bool exact = true;
    for (const int64_t rows : {1, 33}) {
      for (const int64_t features : {3, 64, 200, 4099}) {
        exact = exact && is_exact(rows, features);
      }
    }
    if (!uses_library()) { // another thread has just switched it off
      return false;
    }
    proved = exact;
  }
  return proved == 1;
}

// products = x @ weight.T, int8 to int32, exact for at most `slice` columns.
void multiply(const Tensor& products, const Tensor& x, const Tensor& weight) {
  if (x.size(1) == 0) {
    products.zero_();
  } else if (x.is_cuda()) {
    multiply_padded(products, x, weight);
  } else if (is_exact_on_cpu()) {
    const OneThread one_thread((x.size(0) + packing_rows) * weight.numel() <= small_work);
    multiply_by_library(products, x, weight);
  } else {
    multiply_in_floats(products, x, weight);
  }
}

// The same arithmetic in int64, where 32 bits may not hold the sums; slow and rare.
Tensor wide_product(const IntegerRows& x, const IntegerRows& weight, const Tensor& bias, at::ScalarType dtype) {
  const auto features = x.values.size(1);
  auto sum = at::zeros({x.values.size(0), weight.values.size(0)}, x.steps.options());
  const auto products = fresh(sum.sizes(), at::kInt, sum);
  for (int64_t begin = 0; begin < features; begin += slice) {
    const auto count = std::min(slice, features - begin);
    multiply(
        products, x.values.narrow(1, begin, count).contiguous(), weight.values.narrow(1, begin, count).contiguous());
    sum += products;
  }
  const auto column = [](const Tensor& of_rows) {
    return of_rows.unsqueeze(1);
  };
  sum -= column(x.zero_point) * (weight.steps + weight.zero_point.to(at::kLong) * features);
  sum -= column(x.steps) * weight.zero_point;
  // from here on numbers are rounded, which the threads of torch's own loops might do in another way
  const OneThread one_thread(sum.is_cpu());
  const auto arithmetic = sum.is_cpu() ? std::make_unique<cpu::StandardArithmetic>() : nullptr;
  auto y = sum.to(x.scale.scalar_type()) * (column(x.scale) * weight.scale);
  if (bias.defined()) {
    y += bias;
  }
  return y.to(dtype);
}

bool is_rows(const QuantSpec& spec, int64_t columns) {
  const auto& [kind, argument] = spec.granularity;
  return kind == Granularity::per_token || (kind == Granularity::per_channel && (argument == 0 || argument == -2)) ||
      (kind == Granularity::per_group && argument == columns);
}

IntegerRows rows_apart(const Tensor& matrix) {
  const auto rows = matrix.size(0);
  return {fresh(matrix.sizes(), at::kChar, matrix), fresh({rows}, compute_dtype(matrix.scalar_type()), matrix),
      fresh({rows}, at::kInt, matrix), fresh({rows}, at::kLong, matrix)};
}

IntegerRows rows_in_one_memory(const Tensor& matrix) {
  const auto rows = matrix.size(0);
  const auto compute = compute_dtype(matrix.scalar_type());
  int64_t bytes = 0;
  const auto place_of = [&bytes](int64_t elements, at::ScalarType dtype) {
    const auto place = bytes;
    bytes += (elements * static_cast<int64_t>(c10::elementSize(dtype)) + 63) / 64 * 64; // aligned as if it were apart
    return place;
  };
  const auto values = place_of(matrix.numel(), at::kChar);
  const auto scale = place_of(rows, compute);
  const auto zero_point = place_of(rows, at::kInt);
  const auto steps = place_of(rows, at::kLong);
  const auto memory = fresh({bytes}, at::kByte, matrix);
  return {within(memory, values, matrix.sizes(), at::kChar), within(memory, scale, {rows}, compute),
      within(memory, zero_point, {rows}, at::kInt), within(memory, steps, {rows}, at::kLong)};
}

} // namespace

bool is_integer_input(const QuantSpec& spec) {
  const auto kind = spec.granularity.kind;
  return spec.num_bits <= 8 && (kind == Granularity::per_tensor || kind == Granularity::per_token);
}

bool is_integer_weight(const QuantSpec& spec, int64_t in_features) {
  return spec.num_bits <= 8 && (spec.granularity.kind == Granularity::per_tensor || is_rows(spec, in_features));
}

bool multiplies_integers(const Tensor& weight, at::IntArrayRef specs) {
  if (specs.size() != 4 * code_size || weight.dim() != 2) {
    return false;
  }
  const auto input = spec_of(code_of(specs, Role::input)), of_weight = spec_of(code_of(specs, Role::weight));
  return input && of_weight && is_integer_input(*input) && is_integer_weight(*of_weight, weight.size(1));
}

IntegerRows integer_rows(const Tensor& matrix, const QuantSpec& spec, Memory memory) {
  const auto result = memory == Memory::apart ? rows_apart(matrix) : rows_in_one_memory(matrix);
  if (matrix.size(0) > 0) {
    QATFAST_ON(matrix, integer_rows)(contiguous(matrix), spec, result);
  }
  return result;
}

Tensor integer_product(const IntegerRows& x, const IntegerRows& weight, const Tensor& bias, at::ScalarType dtype) {
  const auto rows = x.values.size(0), outputs = weight.values.size(0);
  const auto y = fresh({rows, outputs}, dtype, x.values);
  if (y.numel() == 0) {
    return y;
  }
  if (x.values.size(1) > int32_features) {
    return wide_product(x, weight, bias, dtype);
  }
  const auto block_bytes = y.is_cuda() ? cuda_block_bytes : cpu_block_bytes;
  const auto at_once = std::min(rows, std::max(least_rows, block_bytes / (4 * outputs)));
  const auto products = fresh({at_once, outputs}, at::kInt, y);
  for (int64_t begin = 0; begin < rows; begin += at_once) {
    const auto count = std::min(at_once, rows - begin);
    const auto part = [&](const Tensor& of_rows) {
      return count == rows ? of_rows : of_rows.narrow(0, begin, count);
    };
    const auto sums = count == at_once ? products : products.narrow(0, 0, count);
    const IntegerRows some = {part(x.values), part(x.scale), part(x.zero_point), part(x.steps)};
    multiply(sums, some.values, weight.values);
    QATFAST_ON(y, integer_outputs)({sums, some, weight, bias, part(y)});
  }
  return y;
}

} // namespace qatfast
