#include "launchers.h"

namespace qatfast::cpu {

void qat_linear(c10::ArrayRef<FakeQuantizeTask> weight_and_bias) {
  for (const auto& task : weight_and_bias) {
    fake_quantize(task);
  }
}

} // namespace qatfast::cpu
