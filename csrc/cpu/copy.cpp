#include "common/copy.h"
#include "cpu/launch.h"

#include <c10/util/SmallVector.h>
#include <c10/util/irange.h>

#include <cstring>

namespace qatfast::cpu {
namespace {

// One dimension of both tensors; strides in elements.
struct Dim {
  int64_t size;
  int64_t from;
  int64_t to;
};

// The dimensions of more than one element, by decreasing stride of `to`. Neighbours that form one dimension in both
// tensors are joined.
c10::SmallVector<Dim, 5> dims_of(const at::Tensor& from, const at::Tensor& to) {
  c10::SmallVector<Dim, 5> dims;
  for (const auto d : c10::irange(from.dim())) {
    if (from.size(d) > 1) {
      dims.push_back({from.size(d), from.stride(d), to.stride(d)});
    }
  }
  std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) {
    return a.to > b.to;
  });
  c10::SmallVector<Dim, 5> joined;
  for (const auto& dim : dims) {
    if (!joined.empty() && joined.back().to == dim.size * dim.to && joined.back().from == dim.size * dim.from) {
      joined.back() = {joined.back().size * dim.size, dim.from, dim.to};
    } else {
      joined.push_back(dim);
    }
  }
  return joined;
}

template <class U>
void copy_row(const U* from, U* to, int64_t n, int64_t stride) {
  constexpr int64_t call = 16; // below, a loop is faster than a function call
  if (stride == 1 && n >= call) {
    std::copy_n(from, n, to);
  } else if (stride == 0) {
    std::fill_n(to, n, *from);
  } else if (stride == 2) { // the compiler vectorizes a constant stride
    for (int64_t i = 0; i < n; ++i) {
      to[i] = from[2 * i];
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      to[i] = from[i * stride];
    }
  }
}

// to[r][c] = from[c][r] for a cache line of rows.
template <class U, int64_t columns>
void copy_tile(const U* from, U* to, int64_t from_stride, int64_t to_stride) {
  constexpr int64_t rows = 64 / sizeof(U);
  U tile[rows][columns];
  for (int64_t c = 0; c < columns; ++c) {
    U line[rows];
    std::memcpy(line, from + c * from_stride, sizeof(line));
    for (int64_t r = 0; r < rows; ++r) {
      tile[r][c] = line[r];
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(to + r * to_stride, tile[r], sizeof(tile[r]));
  }
}

// Rows of `to` are columns of `from`. Tiles read and write whole cache lines.
template <class U>
void copy_transposed(const U* from, U* to, Dim row, Dim column) {
  constexpr int64_t line = 64 / sizeof(U);
  for (int64_t j = 0; j < column.size; j += line) {
    for (int64_t i = 0; i < row.size; i += line) {
      const U* x = from + i * row.from + j * column.from;
      U* y = to + i * row.to + j;
      if (row.from == 1 && i + line <= row.size && j + line <= column.size) {
        copy_tile<U, line>(x, y, column.from, row.to);
        continue;
      }
      for (int64_t r = 0; r < std::min(line, row.size - i); ++r) {
        copy_row(x + r * row.from, y + r * row.to, std::min(line, column.size - j), column.from);
      }
    }
  }
}

template <class U>
void copy_elements(const U* from, U* to, c10::SmallVector<Dim, 5> dims) {
  if (dims.empty()) {
    *to = *from;
    return;
  }
  const auto column = dims.pop_back_val(); // the dimension along which `to` is contiguous
  Dim row = {1, 0, 0};                     // the dimension along which `from` is read best, if it is another
  const auto nearest = std::min_element(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) {
    return a.from < b.from;
  });
  const bool is_transposed = nearest != dims.end() && 0 < nearest->from && nearest->from < column.from;
  if (nearest != dims.end()) {
    row = is_transposed ? *nearest : dims.back();
    dims.erase(is_transposed ? nearest : dims.end() - 1);
  }
  int64_t others = 1;
  for (const auto& dim : dims) {
    others *= dim.size;
  }
  // A task is some rows, or a piece of one, for one index of the other dimensions.
  constexpr int64_t line = 64 / sizeof(U);
  const auto length = std::min(column.size, grain), pieces = (column.size + length - 1) / length;
  const auto height = std::min(
      row.size, is_transposed ? std::max(line, grain / length / line * line) : std::max<int64_t>(1, grain / length));
  const auto chunks = (row.size + height - 1) / height;
  const auto at_once = std::max<int64_t>(1, grain / (height * length));
  parallel_for(0, others * chunks * pieces, at_once, [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin) {
      auto rows = row, columns = column;
      const auto first_column = begin % pieces * length, first_row = begin / pieces % chunks * height;
      columns.size = std::min(length, column.size - first_column);
      rows.size = std::min(height, row.size - first_row);
      const U* x = from + first_row * row.from + first_column * column.from;
      U* y = to + first_row * row.to + first_column;
      auto index = begin / pieces / chunks;
      for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
        x += index % dim->size * dim->from;
        y += index % dim->size * dim->to;
        index /= dim->size;
      }
      if (is_transposed) {
        copy_transposed(x, y, rows, columns);
      } else {
        for (int64_t i = 0; i < rows.size; ++i) {
          copy_row(x + i * row.from, y + i * row.to, columns.size, column.from);
        }
      }
    }
  });
}

} // namespace

void copy(const at::Tensor& from, const at::Tensor& to) {
  if (from.numel() == 0) {
    return;
  }
  const auto dims = dims_of(from, to);
  const auto with = [&](auto element) {
    using U = decltype(element);
    copy_elements(static_cast<const U*>(from.const_data_ptr()), static_cast<U*>(to.mutable_data_ptr()), dims);
  };
  switch (from.element_size()) {
    case 1:
      return with(uint8_t{});
    case 2:
      return with(uint16_t{});
    case 4:
      return with(uint32_t{});
    default:
      return with(uint64_t{});
  }
}

} // namespace qatfast::cpu
