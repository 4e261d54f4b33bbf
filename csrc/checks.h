// What operators accept, and the error messages for the rest. qatfast/checks.py has the same messages.
#pragma once

#include "common/qparams.h"

#include <c10/util/DimVector.h>

#include <string>

namespace qatfast {

using at::Tensor;

// For messages: names as Python prints them.
std::string name_of(at::ScalarType dtype);
std::string name_of(Granularity granularity);
std::string tuple(at::IntArrayRef sizes);

Granularity checked_granularity(const char* op, at::IntArrayRef code);
QuantSpec checked_spec(
    const char* op, int64_t num_bits, bool symmetric, at::IntArrayRef granularity, bool narrow_range);
std::optional<QuantSpec> checked_spec(const char* op, at::IntArrayRef code);
LinearSpecs checked_specs(const char* op, at::IntArrayRef specs);

void check_float(const char* op, const char* name, at::ScalarType dtype);
// Whether `x` is contiguous and has `size` elements of this dtype; is_vector: in one dimension.
bool is_contiguous_of(const Tensor& x, at::ScalarType dtype, int64_t size);
bool is_vector(const Tensor& x, at::ScalarType dtype, int64_t size);

void check_device(const char* op, const char* name, const Tensor& value, const Tensor& input);

// Raises ValueError if `x` cannot be divided into the blocks of `granularity`.
void check_blocks(const std::string& op, const Tensor& x, Granularity granularity);

// The shape of the scale and the zero point of `x`.
at::DimVector qparams_shape(const Tensor& x, Granularity granularity);

// Checks the values of contiguous zero points on the CPU: elsewhere reading a value would wait for the device.
void check_zero_points(
    const char* op, const char* name, const Tensor& zero_points, int64_t quant_min, int64_t quant_max);

// `of`: the tensor whose dtype decides that of scale, in words.
QParams checked_qparams(const char* op, const Tensor& input, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, Granularity granularity, at::ScalarType dtype, const char* of);

// The arguments of an operator that quantizes `input` with a static range.
struct StaticRange {
  Granularity granularity;
  QParams qparams;
};
StaticRange checked_static_range(const char* op, const Tensor& input, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, at::IntArrayRef granularity);

// `mixed_dtypes`: the product has a dtype of its own, to which the tensors are cast.
void check_linear(
    const char* op, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, bool mixed_dtypes);

} // namespace qatfast
