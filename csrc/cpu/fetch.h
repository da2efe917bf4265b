// What a thread is going to read next, fetched into its cache while it multiplies. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/tiles.h"
#include "cpu/ukernels/ukernels.h"

namespace threshnet_fast::cpu {

// Memory that lies in one piece, to be fetched in parts by one call of a micro-kernel after the
// other; by default without an end.
struct Fetching {
  Fetch next;
  int64_t bytes = std::numeric_limits<int64_t>::max();

  // What a call fetches that multiplies so many words.
  Fetch take(int64_t words) {
    if (bytes <= 0) return {};
    const Fetch part = next;
    next.address = static_cast<const char*>(next.address) + words * next.step;
    bytes -= words * next.step;
    return part;
  }
};

// Rows of maps, of which every call of a micro-kernel fetches some lines.
class FetchList {
 public:
  // `words` are those of a call, with each of which it fetches a line.
  explicit FetchList(int64_t words) : words_(std::max<int64_t>(words, 1)) {}

  // Rows of `floats` floats, `pitch` floats apart.
  void add(const float* data, int64_t pitch, int64_t floats, int64_t rows) {
    if (rows <= 0) return;
    const int64_t lines = divide_up(floats * kFloatBytes, kLineBytes);
    parts_.push_back({reinterpret_cast<const char*>(data), pitch * kFloatBytes, lines, rows});
    streams_ += lines * divide_up(rows, words_);
  }

  // Spreads what there is over so many calls.
  void divide(int64_t calls) { calls_ = std::max<int64_t>(calls, 1); }

  // What the next call fetches.
  Fetch next() {
    due_ += streams_;
    if (due_ < calls_ || part_ == static_cast<int64_t>(parts_.size())) return {nullptr, 0};
    due_ -= calls_;
    const Part& part = parts_[part_];
    const Fetch fetch = {part.data + row_ * part.pitch + line_ * kLineBytes, part.pitch};
    if ((row_ += words_) >= part.rows) {
      row_ = 0;
      if (++line_ >= part.lines) {
        line_ = 0;
        ++part_;
      }
    }
    return fetch;
  }

 private:
  static constexpr int64_t kFloatBytes = sizeof(float);

  struct Part {
    const char* data;
    int64_t pitch, lines, rows;
  };

  int64_t words_;
  std::vector<Part> parts_;
  int64_t streams_ = 0, calls_ = 1, due_ = 0;
  int64_t part_ = 0, row_ = 0, line_ = 0;
};

}  // namespace threshnet_fast::cpu
