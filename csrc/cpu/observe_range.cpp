#include "cpu/launch.h"

#include <c10/util/SmallVector.h>

#include <atomic>
#include <cmath>
#include <mutex>
#include <optional>

namespace qatfast::cpu {
namespace {

// Whether a block has a finite value.
template <class T>
bool has_finite_value(const T* x, const Layout& layout, int64_t block) {
  const auto part = block / layout.blocks, index = block % layout.blocks;
  for (int64_t o = 0; o < layout.outer; ++o) {
    const T* run = x + ((part * layout.outer + o) * layout.blocks + index) * layout.inner;
    for (int64_t i = 0; i < layout.inner; ++i) {
      if (std::isfinite(static_cast<opmath_type<T>>(run[i]))) {
        return true;
      }
    }
  }
  return false;
}

// The stored range of a module and the range of the batch at hand.
template <class T>
class Observation {
 public:
  using C = opmath_type<T>;

  Observation(const T* x, const Layout& layout, const ObservedRange& range)
      : x_(x),
        layout_(layout),
        blocks_(layout.parts * layout.blocks),
        constant_(range.averaging_constant),
        running_min_(range.running_min.mutable_data_ptr<float>()),
        running_max_(range.running_max.mutable_data_ptr<float>()),
        num_batches_(range.num_batches.mutable_data_ptr<int64_t>()),
        lo_(blocks_, C(0)),
        hi_(blocks_, C(0)) {}

  // Whether every block has a stored range, so that the grid does not depend on the batch.
  bool is_stored() const {
    bool is_stored = true;
    for (int64_t block = 0; block < blocks_; ++block) {
      is_stored &= !is_new(block);
    }
    return is_stored;
  }

  // Finds the range of the batch.
  void find() {
    const bool are_finite = for_each_range(x_, layout_, [&](int64_t first, int64_t blocks, const C* lo, const C* hi) {
      std::copy_n(lo, blocks, lo_.data() + first);
      std::copy_n(hi, blocks, hi_.data() + first);
    });
    note(are_finite);
  }

  // Where a loop that finds the range itself stores it, from zeros on; it notes whether all values are finite.
  C* lo() {
    return lo_.data();
  }
  C* hi() {
    return hi_.data();
  }
  void note(bool are_finite) {
    if (!are_finite) {
      all_finite_ = false;
    }
  }

  // What quantizes the batch: the stored range, or that of the batch for a block without one.
  void choose(const QuantSpec& spec, C* scale, int32_t* zero_point) const {
    constexpr int64_t piece = 64;
    C low[piece], high[piece];
    for (int64_t first = 0; first < blocks_; first += piece) {
      const auto count = std::min(piece, blocks_ - first);
      for (int64_t i = 0; i < count; ++i) {
        const auto block = first + i;
        low[i] = is_new(block) ? stored_end(lo_[block]) : running_min_[block];
        high[i] = is_new(block) ? stored_end(hi_[block]) : running_max_[block];
      }
      chosen().loops<C>().choose(low, high, count, spec.quant_range<C>(), scale + first, zero_point + first);
    }
  }

  // Moves the stored range by that of the batch.
  void move() const {
    bool any_finite = false;
    for (int64_t block = 0; block < blocks_; ++block) {
      if (!has_finite(block)) {
        continue;
      }
      const auto low = stored_end(lo_[block]), high = stored_end(hi_[block]);
      const bool takes_batch = is_new(block);
      running_min_[block] =
          takes_batch ? low : moved_end(running_min_[block], low, std::min(running_min_[block], low), constant_);
      running_max_[block] =
          takes_batch ? high : moved_end(running_max_[block], high, std::max(running_max_[block], high), constant_);
      any_finite = true;
    }
    *num_batches_ += any_finite;
  }

 private:
  bool is_new(int64_t block) const {
    return is_new_range(running_min_[block], running_max_[block]);
  }

  bool has_finite(int64_t block) const {
    return (all_finite_ && layout_.numel() > 0) || lo_[block] != hi_[block] || has_finite_value(x_, layout_, block);
  }

  const T* x_;
  const Layout layout_;
  const int64_t blocks_;
  const float constant_;
  float* running_min_;
  float* running_max_;
  int64_t* num_batches_;
  c10::SmallVector<C, 8> lo_, hi_; // of the batch
  std::atomic<bool> all_finite_{true};
};

// Quantizes runs of one grid each and finds their ranges in the same pass.
template <class T>
class QuantizeAndFind {
 public:
  using C = opmath_type<T>;

  QuantizeAndFind(const T* x, T* y, uint8_t* mask) : x_(x), y_(y), mask_(mask) {}

  // Widens the range in lo, hi by the finite values. Returns whether all are finite.
  bool operator()(int64_t begin, int64_t n, const Grids<C>& grid, C* lo, C* hi) const {
    return loop_(x_ + begin, y_ + begin, mask_ ? mask_ + begin / 8 : nullptr, n, grid, lo, hi);
  }

 private:
  decltype(Loops<T>::fake_quantize_range) const loop_ = chosen().loops<T>().fake_quantize_range;
  const T* x_;
  T* y_;
  uint8_t* mask_;
};

// One block: every task finds the range of its stretch.
template <class T>
void fake_quantize_and_find_tensor(
    const QuantizeAndFind<T>& run, int64_t n, const Grids<opmath_type<T>>& grid, Observation<T>& seen) {
  using C = opmath_type<T>;
  std::mutex mutex;
  parallel_over_memory(n, [&](int64_t begin, int64_t end) {
    C lo = 0, hi = 0;
    const bool is_finite = run(begin, end - begin, grid, &lo, &hi);
    const std::lock_guard lock(mutex);
    seen.note(is_finite);
    *seen.lo() = widen_lo(*seen.lo(), lo);
    *seen.hi() = widen_hi(*seen.hi(), hi);
  });
}

// Blocks that are runs of memory. With a mask, a run is a whole number of its bytes.
template <class T>
void fake_quantize_and_find_rows(
    const QuantizeAndFind<T>& run, const Layout& layout, const Grids<opmath_type<T>>& grids, Observation<T>& seen) {
  for_each_tile(layout.blocks, layout.inner, [&](int64_t first, int64_t rows) {
    for (int64_t row = first; row < first + rows; ++row) {
      seen.note(run(row * layout.inner, layout.inner, grids.from(row), seen.lo() + row, seen.hi() + row));
    }
  });
}

} // namespace

void fake_quantize_observed(const at::Tensor& x, const at::Tensor& to, const at::Tensor& mask, const QuantSpec& spec,
    const ObservedRange& range, const at::Tensor& scale, const at::Tensor& zero_point) {
  const auto layout = layout_of(x, spec.granularity);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "fake_quantize_observed", [&] {
    using C = opmath_type<scalar_t>;
    const StandardArithmetic arithmetic;
    Observation<scalar_t> seen(x.const_data_ptr<scalar_t>(), layout, range);
    auto* scales = scale.mutable_data_ptr<C>();
    auto* zero_points = zero_point.mutable_data_ptr<int32_t>();
    const bool is_tensor = layout.numel() > 0 && layout.blocks * layout.parts == 1;
    const bool is_rows = are_whole_rows(layout) && (!mask.defined() || layout.inner % 8 == 0);
    if (to.defined() && (is_tensor || is_rows) && seen.is_stored()) {
      seen.choose(spec, scales, zero_points);
      const auto grids = grids_of<C>({scale, zero_point, spec.quant_min(), spec.quant_max()});
      const QuantizeAndFind<scalar_t> run(x.const_data_ptr<scalar_t>(), to.mutable_data_ptr<scalar_t>(),
          mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr);
      is_tensor ? fake_quantize_and_find_tensor(run, layout.numel(), grids, seen)
                : fake_quantize_and_find_rows(run, layout, grids, seen);
    } else {
      seen.find();
      seen.choose(spec, scales, zero_points);
      if (to.defined()) {
        fake_quantize_affine(x, to, mask, {scale, zero_point, spec.quant_min(), spec.quant_max()}, layout);
      }
    }
    seen.move();
  });
}

namespace {

// Quantizes a tensor to uint8 with one grid.
template <class T>
class ToIntegers {
 public:
  using C = opmath_type<T>;

  ToIntegers(const at::Tensor& x, const at::Tensor& mask, const QParams& shifted, bool observes)
      : x_(x.const_data_ptr<T>()),
        observes_(observes),
        mask_(mask.defined() ? mask.mutable_data_ptr<uint8_t>() : nullptr),
        grid_(grids_of<C>(shifted)) {}

  // Writes the integers to `to`, and widens the range in lo, hi by the finite values if it is observed. Returns whether
  // all are finite.
  bool run(int64_t begin, int64_t end, uint8_t* to, C* lo, C* hi) const {
    if (!observes_ && !mask_) {
      return loops_.quantize_finite(x_ + begin, to, end - begin, grid_);
    }
    return loops_.quantize_range(x_ + begin, to, mask_ ? mask_ + begin / 8 : nullptr, end - begin, grid_, lo, hi);
  }

  bool has_nan(int64_t begin, int64_t end) const {
    return std::any_of(x_ + begin, x_ + end, [](T x) {
      return x != x;
    });
  }

 private:
  const Loops<T>& loops_ = chosen().loops<T>();
  const T* x_;
  const bool observes_;
  uint8_t* mask_;
  const Grids<C> grid_; // of the integers; its levels are those of the values
};

} // namespace

bool quantize_to_uint8(const at::Tensor& x, const at::Tensor& values, const at::Tensor& mask, const QuantSpec& spec,
    const std::optional<ObservedRange>& range, const QParams& qparams, const at::Tensor& shifted_zero_point,
    QuantizePass pass) {
  bool has_nan = false;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "quantize", [&] {
    using C = opmath_type<scalar_t>;
    const StandardArithmetic arithmetic;
    std::optional<Observation<scalar_t>> seen;
    bool is_seen = false; // whether the range of the batch is known
    if (range) {
      seen.emplace(x.const_data_ptr<scalar_t>(), Layout{1, 1, x.numel()}, *range);
      is_seen = !seen->is_stored();
      if (is_seen) {
        seen->find();
      }
      seen->choose(spec, qparams.scale.mutable_data_ptr<C>(), qparams.zero_point.mutable_data_ptr<int32_t>());
    }
    const auto shift = spec.uint8_shift();
    *shifted_zero_point.mutable_data_ptr<int32_t>() = *qparams.zero_point.const_data_ptr<int32_t>() + shift;
    const QParams shifted = {qparams.scale, shifted_zero_point, spec.quant_min() + shift, spec.quant_max() + shift};
    const ToIntegers<scalar_t> integers(x, mask, shifted, range && !is_seen);
    std::mutex mutex;
    const auto quantize = [&](int64_t begin, int64_t end, uint8_t* to) {
      C lo = 0, hi = 0;
      const bool is_finite = integers.run(begin, end, to, &lo, &hi);
      const bool part_has_nan = !is_finite && integers.has_nan(begin, end);
      const std::lock_guard lock(mutex);
      has_nan |= part_has_nan;
      if (range && !is_seen) {
        seen->note(is_finite);
        *seen->lo() = widen_lo(*seen->lo(), lo);
        *seen->hi() = widen_hi(*seen->hi(), hi);
      }
    };
    if (pass) {
      pass(quantize);
    } else {
      auto* const to = values.mutable_data_ptr<uint8_t>();
      parallel_over_memory(x.numel(), [&](int64_t begin, int64_t end) {
        quantize(begin, end, to + begin);
      });
    }
    if (range) {
      seen->move();
    }
  });
  return has_nan;
}

void qparams_of_range(const at::Tensor& lo, const at::Tensor& hi, const QuantSpec& spec, const at::Tensor& scale,
    const at::Tensor& zero_point) {
  AT_DISPATCH_FLOATING_TYPES(lo.scalar_type(), "qparams_of_range", [&] {
    const StandardArithmetic arithmetic;
    chosen().loops<scalar_t>().choose(lo.const_data_ptr<scalar_t>(), hi.const_data_ptr<scalar_t>(), lo.numel(),
        spec.quant_range<scalar_t>(), scale.mutable_data_ptr<scalar_t>(), zero_point.mutable_data_ptr<int32_t>());
  });
}

} // namespace qatfast::cpu
