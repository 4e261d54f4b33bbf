// What the int8 GEMM needs besides the product: rows of integers, and the outputs from the sums.
#include "cpu/launch.h"

namespace qatfast::cpu {
namespace {

// With static ranges if `qparams` is not null.
void quantize_rows_with(const at::Tensor& x, const QuantSpec& spec, const QParams* qparams, const Int8Rows& to) {
  const auto rows = x.size(0), columns = x.size(1);
  const bool per_tensor = spec.granularity.kind == Granularity::per_tensor;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "qat_linear", [&] {
    using C = opmath_type<scalar_t>;
    const auto& loops = chosen().loops<scalar_t>();
    const auto* values = x.const_data_ptr<scalar_t>();
    auto* q = to.values.mutable_data_ptr<int8_t>();
    auto* scale = to.scale.mutable_data_ptr<C>();
    auto* zero_point = to.zero_point.mutable_data_ptr<int32_t>();
    auto* level_sums = to.level_sums.mutable_data_ptr<int64_t>();
    const auto shift = static_cast<int32_t>(Int8Rows::shift(spec));
    const auto range = spec.quant_range<C>();
    const auto* static_scale = qparams ? qparams->scale.const_data_ptr<C>() : nullptr;
    const auto* static_zero_point = qparams ? qparams->zero_point.const_data_ptr<int32_t>() : nullptr;
    C tensor_scale = 0;
    int32_t tensor_zero_point = 0;
    bool tensor_unclamped = false;
    if (qparams && per_tensor) {
      tensor_scale = *static_scale;
      tensor_zero_point = *static_zero_point;
    } else if (per_tensor) {
      tensor_unclamped =
          choose_qparams_of_blocks(values, {1, 1, rows * columns}, spec, &tensor_scale, &tensor_zero_point);
    }
    for_each_tile(rows, columns, [&](int64_t first, int64_t count) {
      const auto* from = values + first * columns;
      C tile_scale[tile_rows];
      int32_t tile_zero_point[tile_rows];
      bool unclamped = tensor_unclamped;
      if (per_tensor) {
        std::fill_n(tile_scale, count, tensor_scale);
        std::fill_n(tile_zero_point, count, tensor_zero_point);
      } else if (qparams) {
        std::copy_n(static_scale + first, count, tile_scale);
        std::copy_n(static_zero_point + first, count, tile_zero_point);
      } else {
        unclamped = loops.choose_qparams(from, count, columns, range, tile_scale, tile_zero_point);
      }
      for (int64_t i = 0; i < count; ++i) {
        zero_point[first + i] = tile_zero_point[i] - shift;
      }
      loops.quantize_rows(from, q + first * columns, count, columns,
          {tile_scale, zero_point + first, range.quant_min - shift, range.quant_max - shift, unclamped}, scale + first,
          level_sums + first);
    });
  });
}

} // namespace

void quantize_rows(const at::Tensor& x, const QuantSpec& spec, const Int8Rows& to) {
  quantize_rows_with(x, spec, /*qparams=*/nullptr, to);
}

void quantize_rows_static(const at::Tensor& x, const QuantSpec& spec, const QParams& qparams, const Int8Rows& to) {
  quantize_rows_with(x, spec, &qparams, to);
}

void int8_epilogue(const Int8EpilogueTask& task) {
  const auto rows = task.products.size(0), columns = task.products.size(1);
  const auto in_features = task.x.values.size(1);
  const auto* weight_zero_point = task.weight.zero_point.const_data_ptr<int32_t>();
  const auto* weight_level_sums = task.weight.level_sums.const_data_ptr<int64_t>();
  std::vector<int32_t> weight_sum(columns);
  bool affine = false;
  for (int64_t j = 0; j < columns; ++j) {
    weight_sum[j] = static_cast<int32_t>(weight_level_sums[j] + in_features * weight_zero_point[j]);
    affine |= weight_zero_point[j] != 0;
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, task.y.scalar_type(), "qat_linear", [&] {
    using C = opmath_type<scalar_t>;
    const auto epilogue = chosen().loops<scalar_t>().epilogue;
    const auto* products = task.products.const_data_ptr<int32_t>();
    const auto* scale = task.x.scale.const_data_ptr<C>();
    const auto* zero_point = task.x.zero_point.const_data_ptr<int32_t>();
    const auto* level_sums = task.x.level_sums.const_data_ptr<int64_t>();
    const auto* weight_scale = task.weight.scale.const_data_ptr<C>();
    const auto* bias = task.bias.defined() ? task.bias.const_data_ptr<C>() : nullptr;
    auto* y = task.y.mutable_data_ptr<scalar_t>();
    parallel_for(0, rows, std::max<int64_t>(1, grain / columns), [&](int64_t row, int64_t end) {
      for (; row < end; ++row) {
        epilogue(products + row * columns, y + row * columns, columns,
            {scale[row], zero_point[row], static_cast<int32_t>(level_sums[row]), weight_scale,
                affine ? weight_zero_point : nullptr, weight_sum.data(), bias});
      }
    });
  });
}

} // namespace qatfast::cpu
