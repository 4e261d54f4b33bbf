#include "launch.h"

namespace qatfast::cpu {

void qat_linear(c10::ArrayRef<FakeQuantizeTask> weight_and_bias) {
  for (const auto& task : weight_and_bias) {
    fake_quantize(task);
  }
}

void integer_rows(const at::Tensor& x, const QuantSpec& spec, const IntegerRows& to) {
  const auto rows = x.size(0), columns = x.size(1);
  const bool per_tensor = spec.granularity.kind == Granularity::per_tensor;
  with_float_type(x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using C = compute_t<T>;
    const auto& loops = chosen().loops<T>();
    const auto* values = x.const_data_ptr<T>();
    auto* q = to.values.mutable_data_ptr<int8_t>();
    auto* scale = to.scale.mutable_data_ptr<C>();
    auto* zero_point = to.zero_point.mutable_data_ptr<int32_t>();
    auto* steps = to.steps.mutable_data_ptr<int64_t>();
    const auto shift = static_cast<int32_t>(IntegerRows::shift(spec));
    const auto min = static_cast<C>(spec.quant_min()), max = static_cast<C>(spec.quant_max());
    C scale_of_all = 0;
    int32_t zero_point_of_all = 0;
    const bool all_unclamped =
        per_tensor && choose_qparams_of_blocks(values, {1, 1, rows * columns}, spec, &scale_of_all, &zero_point_of_all);
    for_each_tile(rows, columns, [&](int64_t first, int64_t count) {
      const T* from = values + first * columns;
      C chosen_scale[tile_rows];
      int32_t chosen_zero_point[tile_rows];
      bool unclamped = all_unclamped;
      if (per_tensor) {
        std::fill_n(chosen_scale, count, scale_of_all);
        std::fill_n(chosen_zero_point, count, zero_point_of_all);
      } else {
        unclamped =
            loops.choose_qparams(from, count, columns, {min, max, spec.symmetric}, chosen_scale, chosen_zero_point);
      }
      for (int64_t i = 0; i < count; ++i) {
        zero_point[first + i] = chosen_zero_point[i] - shift;
      }
      loops.integers(from, q + first * columns, count, columns,
          {chosen_scale, zero_point + first, min - shift, max - shift, unclamped}, scale + first, steps + first);
    });
  });
}

void integer_outputs(const ProductTask& task) {
  const auto rows = task.products.size(0), columns = task.products.size(1);
  const auto in_features = task.x.values.size(1);
  const auto* weight_zero_point = task.weight.zero_point.const_data_ptr<int32_t>();
  const auto* weight_steps = task.weight.steps.const_data_ptr<int64_t>();
  std::vector<int32_t> weight_sum(columns);
  bool affine = false;
  for (int64_t j = 0; j < columns; ++j) {
    weight_sum[j] = static_cast<int32_t>(weight_steps[j] + in_features * weight_zero_point[j]);
    affine |= weight_zero_point[j] != 0;
  }
  with_float_type(task.y.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using C = compute_t<T>;
    const auto outputs = chosen().loops<T>().outputs;
    const auto* products = task.products.const_data_ptr<int32_t>();
    const auto* scale = task.x.scale.const_data_ptr<C>();
    const auto* zero_point = task.x.zero_point.const_data_ptr<int32_t>();
    const auto* steps = task.x.steps.const_data_ptr<int64_t>();
    const auto* weight_scale = task.weight.scale.const_data_ptr<C>();
    const auto* bias = task.bias.defined() ? task.bias.const_data_ptr<C>() : nullptr;
    auto* y = task.y.mutable_data_ptr<T>();
    parallel_for(0, rows, std::max<int64_t>(1, grain / columns), [&](int64_t row, int64_t end) {
      for (; row < end; ++row) {
        outputs(products + row * columns, y + row * columns, columns,
            {scale[row], zero_point[row], static_cast<int32_t>(steps[row]), weight_scale,
                affine ? weight_zero_point : nullptr, weight_sum.data(), bias});
      }
    });
  });
}

} // namespace qatfast::cpu
