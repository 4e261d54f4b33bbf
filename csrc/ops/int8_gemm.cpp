#include "ops/int8_gemm.h"

#include "checks.h"
#include "common/copy.h"
#include "common/memory.h"
#include "cpu/arithmetic.h"
#include "launchers.h"

#include <ATen/Context.h>
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/_int_mm.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <memory>

namespace qatfast {
namespace {

using at::Tensor;

constexpr int64_t float_features = 1024; // sums of -128 * -128 reach 2^24, up to which float32 holds all integers
constexpr int64_t slice = 65536;         // sums of -128 * -128 fit in 32 bits, even if a library shifts a factor by 128
constexpr int64_t small_work = 1 << 22;  // multiplications that take less time than waking another thread
constexpr int64_t packing_rows = 32;     // the rows that take as long as the library's packing of the weight
constexpr int64_t least_rows = 512;      // below, packing the weight again dominates a product
// The products that become outputs at a time. On the CPU they are still in cache then. On a GPU one product is the
// fastest, and this bounds the memory.
constexpr int64_t cpu_chunk_bytes = 8 << 20, cuda_chunk_bytes = 256 << 20;

// While it lives, parallel loops that this thread begins in the library stay on this thread.
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

// products = x @ weight.T in float32. Sums of so few products are exact in any order, also with factors rounded to
// bfloat16, which torch.set_float32_matmul_precision allows.
void multiply_in_floats(const Tensor& products, const Tensor& x, const Tensor& weight) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset); // it would round the sums
  const auto features = x.size(1);
  for (int64_t begin = 0; begin < features; begin += float_features) {
    const auto count = std::min(float_features, features - begin);
    const auto columns_of = [&](const Tensor& matrix) {
      return matrix.narrow(1, begin, count).to(at::kFloat);
    };
    const auto sums = at::mm(columns_of(x), columns_of(weight).t());
    begin == 0 ? products.copy_(sums) : products.add_(sums.to(at::kInt));
  }
}

// products = x @ weight.T by the library.
void multiply_by_library(Tensor products, const Tensor& x, const Tensor& weight) {
  if (x.size(1) == 1) { // oneDNN misreads the strides
    at::mul_out(products, x.to(at::kInt), weight.t());
  } else { // It also misreads other strides of a single row than those that view() gives.
    at::_int_mm_out(products, x.view(x.sizes()), weight.view(weight.sizes()).t());
  }
}

// cuBLASLt requires more than 16 rows, and multiples of 8 in the other sizes.
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

// Whether the library multiplies the largest integers exactly. On processors without VNNI it adds pairs of products in
// 16 bits, which saturates for two columns or more.
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

// Whether oneDNN may serve this product. torch.backends.mkldnn.enabled is read at each call: without it torch runs a
// loop of its own, which is slow and exact, so that its results prove nothing about oneDNN.
bool is_exact_on_cpu() {
  const auto uses_library = [] {
    return at::globalContext().userEnabledMkldnn();
  };
  static std::atomic<int> proved{-1}; // 1: exact, 0: not exact, -1: not known
  if (!uses_library()) {
    return false;
  }
  if (proved < 0) {
    bool exact = true;
    for (const int64_t rows : {1, 33}) {
      for (const int64_t features : {3, 64, 200, 4099}) { // the last has sums that float32 does not hold
        exact = exact && is_exact(rows, features);
      }
    }
    if (!uses_library()) { // another thread has switched it off
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
  } else if (cpu::prefers_pair_products()) {
    cpu::int8_mm(products, x, weight);
  } else if (is_exact_on_cpu()) {
    const OneThread one_thread((x.size(0) + packing_rows) * weight.numel() <= small_work);
    multiply_by_library(products, x, weight);
  } else {
    multiply_in_floats(products, x, weight);
  }
}

// The same arithmetic in int64, for sums that 32 bits may not hold. It is slow and rarely needed.
Tensor int64_gemm(const Int8Rows& x, const Int8Rows& weight, const Tensor& bias, at::ScalarType dtype) {
  const auto features = x.values.size(1);
  auto sum = at::zeros({x.values.size(0), weight.values.size(0)}, x.level_sums.options());
  const auto products = fresh(sum.sizes(), at::kInt, sum);
  for (int64_t begin = 0; begin < features; begin += slice) {
    const auto count = std::min(slice, features - begin);
    multiply(
        products, x.values.narrow(1, begin, count).contiguous(), weight.values.narrow(1, begin, count).contiguous());
    sum += products;
  }
  const auto column = [](const Tensor& vector) {
    return vector.unsqueeze(1);
  };
  sum -= column(x.zero_point) * (weight.level_sums + weight.zero_point.to(at::kLong) * features);
  sum -= column(x.level_sums) * weight.zero_point;
  // From here on numbers are rounded, for which other threads may have another floating-point environment.
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

Int8Rows separate_rows(const Tensor& matrix) {
  const auto rows = matrix.size(0);
  return {fresh(matrix.sizes(), at::kChar, matrix), fresh({rows}, at::toOpMathType(matrix.scalar_type()), matrix),
      fresh({rows}, at::kInt, matrix), fresh({rows}, at::kLong, matrix)};
}

Int8Rows rows_in_shared_memory(const Tensor& matrix) {
  const auto rows = matrix.size(0);
  const auto opmath_dtype = at::toOpMathType(matrix.scalar_type());
  int64_t bytes = 0;
  const auto place_of = [&bytes](int64_t elements, at::ScalarType dtype) {
    const auto place = bytes;
    bytes += (elements * static_cast<int64_t>(c10::elementSize(dtype)) + 63) / 64 * 64; // as aligned as a separate one
    return place;
  };
  const auto values = place_of(matrix.numel(), at::kChar);
  const auto scale = place_of(rows, opmath_dtype);
  const auto zero_point = place_of(rows, at::kInt);
  const auto level_sums = place_of(rows, at::kLong);
  const auto memory = fresh({bytes}, at::kByte, matrix);
  return {within(memory, values, matrix.sizes(), at::kChar), within(memory, scale, {rows}, opmath_dtype),
      within(memory, zero_point, {rows}, at::kInt), within(memory, level_sums, {rows}, at::kLong)};
}

} // namespace

bool is_int8_input(const QuantSpec& spec) {
  const auto kind = spec.granularity.kind;
  return spec.num_bits <= 8 && (kind == Granularity::per_tensor || kind == Granularity::per_token);
}

bool is_int8_weight(const QuantSpec& spec, int64_t in_features) {
  return spec.num_bits <= 8 && (spec.granularity.kind == Granularity::per_tensor || is_rows(spec, in_features));
}

bool uses_int8_gemm(const Tensor& weight, at::IntArrayRef specs) {
  if (specs.size() != LinearSpecs::size || weight.dim() != 2) {
    return false;
  }
  const auto spec_of = [&](LinearSpecs::Role role) {
    return LinearSpecs::decoded(LinearSpecs::code_of(specs, role));
  };
  const auto input_spec = spec_of(LinearSpecs::input_role), weight_spec = spec_of(LinearSpecs::weight_role);
  return input_spec && weight_spec && is_int8_input(*input_spec) && is_int8_weight(*weight_spec, weight.size(1));
}

Int8Rows quantize_rows(
    const Tensor& matrix, const QuantSpec& spec, Allocation allocation, const std::optional<QParams>& qparams) {
  const auto result = allocation == Allocation::separate ? separate_rows(matrix) : rows_in_shared_memory(matrix);
  if (matrix.size(0) > 0 && qparams) {
    QATFAST_ON(matrix, quantize_rows_static)(contiguous(matrix), spec, *qparams, result);
  } else if (matrix.size(0) > 0) {
    QATFAST_ON(matrix, quantize_rows)(contiguous(matrix), spec, result);
  }
  return result;
}

Tensor int8_mm(const Tensor& x, const Tensor& weight) {
  TORCH_CHECK_VALUE(x.is_cpu() && x.scalar_type() == at::kChar && weight.scalar_type() == at::kChar && x.dim() == 2 &&
          weight.dim() == 2 && x.size(1) == weight.size(1) && x.size(1) <= slice,
      "int8_mm: expected int8 matrices of as many columns, at most ", slice, ", on the CPU, got ",
      name_of(x.scalar_type()), " of shape ", tuple(x.sizes()), " and ", name_of(weight.scalar_type()), " of shape ",
      tuple(weight.sizes()));
  const auto products = fresh({x.size(0), weight.size(0)}, at::kInt, x);
  if (products.numel() > 0) {
    multiply(products, x.contiguous(), weight.contiguous());
  }
  return products;
}

Tensor int8_gemm(const Int8Rows& x, const Int8Rows& weight, const Tensor& bias, at::ScalarType dtype) {
  const auto rows = x.values.size(0), outputs = weight.values.size(0);
  const auto y = fresh({rows, outputs}, dtype, x.values);
  if (y.numel() == 0) {
    return y;
  }
  if (x.values.size(1) > int32_features) {
    return int64_gemm(x, weight, bias, dtype);
  }
  const auto chunk_bytes = y.is_cuda() ? cuda_chunk_bytes : cpu_chunk_bytes;
  const auto chunk = std::min(rows, std::max(least_rows, chunk_bytes / (4 * outputs)));
  const auto products = fresh({chunk, outputs}, at::kInt, y);
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const auto count = std::min(chunk, rows - begin);
    const auto rows_of = [&](const Tensor& tensor) {
      return count == rows ? tensor : tensor.narrow(0, begin, count);
    };
    const auto sums = count == chunk ? products : products.narrow(0, 0, count);
    const Int8Rows x_rows = {rows_of(x.values), rows_of(x.scale), rows_of(x.zero_point), rows_of(x.level_sums)};
    multiply(sums, x_rows.values, weight.values);
    QATFAST_ON(y, int8_epilogue)({sums, x_rows, weight, bias, rows_of(y)});
  }
  return y;
}

} // namespace qatfast
