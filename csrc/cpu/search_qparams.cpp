#include "cpu/launch.h"
#include "cpu/sum.h"

#include <c10/util/SmallVector.h>

#include <array>
#include <cmath>
#include <limits>
#include <mutex>

namespace qatfast::cpu {
namespace {

// The search in one block. Its grids are numbered from the largest factor on.
//
// The sum of one grid, a good guess, is computed first. Most others are then excluded by a lower bound: that of their
// approximate errors over a part of the values, since a sum grows with each value.
template <class T>
class Search {
 public:
  using C = opmath_type<T>;

  Search(const T* x, int64_t n, const QuantRange<C>& range) : x_(x), n_(n), range_(range) {
    find_extremes();
    C los[shrunk_ranges], his[shrunk_ranges];
    for (int64_t i = 0; i < shrunk_ranges; ++i) {
      const C factor = shrinking_factor<C>(i);
      los[i] = lo_ * factor;
      his[i] = hi_ * factor;
    }
    loops_.choose(los, his, shrunk_ranges, range, scale_.data(), zero_point_.data());
  }

  C scale(int64_t i) const {
    return scale_[i];
  }
  int32_t zero_point(int64_t i) const {
    return zero_point_[i];
  }

  // The grid with the least sum; of equal ones, the first.
  int64_t best() {
    if (lo_ == hi_) { // zeros, which every grid holds
      return 0;
    }
    const bool has_bounds = std::all_of(scale_.begin(), scale_.end(), [](C scale) {
      return has_reciprocal(scale);
    });
    if (!has_bounds) {
      for (int64_t i = 0; i < shrunk_ranges; ++i) {
        compare(i);
      }
      return best_;
    }
    start();
    for (int64_t round = 0; round < rounds; ++round) {
      add_units(round);
      exclude(sums_, values_);
    }
    while (!left_.empty()) {
      const auto next = most_promising(sums_);
      compare(left_[next]);
      sums_[next] = std::numeric_limits<double>::infinity(); // excludes it too
      exclude(sums_, values_);
    }
    return best_;
  }

 private:
  using Sums = c10::SmallVector<double, shrunk_ranges>;
  static constexpr int64_t rounds = 8;

  // The ends of the ranges of short segments, which hold most of what a small grid clips.
  void find_extremes() {
    const auto size = std::clamp<int64_t>(n_ / 16 / 32 * 32, 32, 1024), segments = n_ / size;
    extremes_.resize(2 * (segments + 1));
    C *lo = extremes_.data(), *hi = lo + segments + 1;
    lo[segments] = hi[segments] = 0;
    parallel_for(0, segments, std::max<int64_t>(16, grain / size), [&](int64_t begin, int64_t end) {
      loops_.range_of_rows(x_ + begin * size, end - begin, size, lo + begin, hi + begin);
    });
    loops_.range(x_ + segments * size, n_ - segments * size, lo + segments, hi + segments);
    lo_ = *std::min_element(lo, hi);
    hi_ = *std::max_element(hi, hi + segments + 1);
  }

  // Guesses the best grid: errors within a grid are evenly distributed. Excludes what clips too much.
  void start() {
    left_.resize(shrunk_ranges);
    grids_.resize(shrunk_ranges);
    sums_.resize(shrunk_ranges, 0.0);
    const auto largest = std::max(-lo_, hi_);
    for (int64_t i = 0; i < shrunk_ranges; ++i) {
      const C least = range_.quant_min - zero_point_[i], most = range_.quant_max - zero_point_[i];
      const C reciprocal = 1 / scale_[i];
      left_[i] = i;
      grids_[i] = {reciprocal, least * scale_[i], most * scale_[i]};
      slack_[i] = 2 * std::numeric_limits<C>::epsilon() * std::max({-least, most, largest * reciprocal});
    }
    Sums clipped(shrunk_ranges, 0.0);
    const auto count = static_cast<int64_t>(extremes_.size());
    chosen().loops<C>().approximate_errors(extremes_.data(), count, grids_.data(), shrunk_ranges, clipped.data());
    const auto guess = most_promising(clipped, static_cast<double>(n_) / 12);
    compare(guess);
    clipped[guess] = std::numeric_limits<double>::infinity();
    exclude(clipped, count);
  }

  // The position in left_ of the grid with the least error: the sum and `more` squares of intervals.
  int64_t most_promising(const Sums& sums, double more = 0) const {
    int64_t best = 0;
    double least = std::numeric_limits<double>::infinity();
    for (size_t i = 0; i < left_.size(); ++i) {
      const double scale = scale_[left_[i]], error = (sums[i] + more) * scale * scale;
      if (error < least) {
        least = error;
        best = static_cast<int64_t>(i);
      }
    }
    return best;
  }

  // Adds the approximate errors of every eighth unit of memory.
  void add_units(int64_t round) {
    const auto size = std::clamp<int64_t>(n_ / rounds, 256, 2048), units = (n_ + size - 1) / size;
    const auto count = static_cast<int64_t>(left_.size());
    if (count == 0 || round >= units) {
      return;
    }
    std::mutex mutex;
    const auto of_round = (units - round + rounds - 1) / rounds;
    parallel_for(0, of_round, std::max<int64_t>(1, grain / (size * count)), [&](int64_t begin, int64_t end) {
      std::array<double, shrunk_ranges> sums{};
      int64_t values = 0;
      for (; begin < end; ++begin) {
        const auto first = (begin * rounds + round) * size, m = std::min(size, n_ - first);
        loops_.approximate_errors(x_ + first, m, grids_.data(), count, sums.data());
        values += m;
      }
      const std::lock_guard lock(mutex);
      values_ += values;
      for (int64_t i = 0; i < count; ++i) {
        sums_[i] += sums[i];
      }
    });
  }

  // Excludes the grids whose sum must be greater than the least one, given those of the squares of approximate offsets
  // of `count` values. In intervals, an exact error is at least the distance of x / scale from the nearest level, less
  // the rounding of level times scale. The approximate offset is at most that distance and the rounding of x times
  // 1 / scale; slack_ is more than both. So are the lengths of the vectors of all errors (triangle inequality). The
  // factor covers the roundings of the two sums and of this comparison.
  void exclude(const Sums& sums, int64_t count) {
    static_assert(4 * approximate_roundings <= 0x1p24 * 0x1p-11);
    const double least_length = std::sqrt(least_), root = std::sqrt(static_cast<double>(count));
    size_t kept = 0;
    for (size_t i = 0; i < left_.size(); ++i) {
      const double length = least_length * grids_[i].reciprocal + slack_[left_[i]] * root;
      if (sums[i] * (1 - 0x1p-11) <= length * length) {
        left_[kept] = left_[i];
        grids_[kept] = grids_[i];
        sums_[kept++] = sums_[i];
      }
    }
    left_.resize(kept);
    grids_.resize(kept);
    sums_.resize(kept);
  }

  // Computes the sum of grid i.
  void compare(int64_t i) {
    std::vector<double> sums(chunks_of(n_));
    const Grids<C> grid = {scale_.data() + i, zero_point_.data() + i, range_.quant_min, range_.quant_max};
    parallel_for(0, static_cast<int64_t>(sums.size()), grain / sum_chunk, [&](int64_t begin, int64_t end) {
      const auto first = begin * sum_chunk, last = std::min(n_, end * sum_chunk);
      loops_.squared_errors(x_ + first, last - first, grid, sums.data() + begin);
    });
    const auto sum = ordered_sum(sums.data(), static_cast<int64_t>(sums.size()));
    if (sum < least_ || (sum == least_ && i < best_)) {
      least_ = sum;
      best_ = i;
    }
  }

  const Loops<T>& loops_ = chosen().loops<T>();
  const T* x_;
  const int64_t n_;
  const QuantRange<C> range_;
  C lo_ = 0, hi_ = 0;
  std::vector<C> extremes_;
  std::array<C, shrunk_ranges> scale_;
  std::array<int32_t, shrunk_ranges> zero_point_;
  std::array<double, shrunk_ranges> slack_;
  int64_t best_ = shrunk_ranges;
  double least_ = std::numeric_limits<double>::infinity();
  // The grids that are left: their numbers, themselves, their approximate errors over `values_` values.
  c10::SmallVector<int64_t, shrunk_ranges> left_;
  c10::SmallVector<ApproximateGrid<C>, shrunk_ranges> grids_;
  Sums sums_;
  int64_t values_ = 0;
};

} // namespace

void search_qparams(const at::Tensor& x, const QuantSpec& spec, const at::Tensor& scale, const at::Tensor& zero_point) {
  const auto rows = x.size(0), n = x.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "search_qparams", [&] {
    using C = opmath_type<scalar_t>;
    const auto range = spec.quant_range<C>();
    const auto* from = x.const_data_ptr<scalar_t>();
    auto* best_scale = scale.mutable_data_ptr<C>();
    auto* best_zero_point = zero_point.mutable_data_ptr<int32_t>();
    const auto search = [&](int64_t begin, int64_t end) {
      const StandardArithmetic arithmetic;
      for (; begin < end; ++begin) {
        Search<scalar_t> search(from + begin * n, n, range);
        const auto best = search.best();
        best_scale[begin] = search.scale(best);
        best_zero_point[begin] = search.zero_point(best);
      }
    };
    if (rows >= 2 * at::get_num_threads()) {
      parallel_for(0, rows, std::max<int64_t>(1, grain / (16 * std::max<int64_t>(n, 1))), search);
    } else {
      search(0, rows); // the loops over a block are parallel
    }
  });
}

} // namespace qatfast::cpu
