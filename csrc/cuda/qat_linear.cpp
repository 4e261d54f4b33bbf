#include "cuda/dynamic_quantize.h"
#include "launchers.h"

#include <c10/util/SmallVector.h>

namespace qatfast::cuda {

void qat_linear(c10::ArrayRef<FakeQuantizeTask> weight_and_bias) {
  c10::SmallVector<DynamicTask, 2> tasks;
  for (const auto& task : weight_and_bias) {
    if (task.from.numel() > 0) {
      tasks.push_back({task.from, task.to, task.spec, {}, {}});
    }
  }
  if (tasks.size() == 2 && tasks[0].from.scalar_type() == tasks[1].from.scalar_type()) {
    return launch_dynamic_quantize(tasks);
  }
  for (const auto& task : tasks) {
    launch_dynamic_quantize(task);
  }
}

} // namespace qatfast::cuda
