#include "raw_plan.h"

#include <algorithm>
#include <limits>

namespace threshnet_fast::cpu {
namespace {

class Reader {
 public:
  Reader(const int64_t* data, int64_t length) : data_(data), length_(length) {}

  RawPlan read() {
    require_plan(next() == kRawMagic, "this is not the description of a plan of training");
    require_plan(next() == kRawVersion, "the description is of another version of threshnet_fast");
    const int64_t buffers = number(1, kMostEntries, "the number of buffers");
    const int64_t norms = number(0, kMostEntries, "the number of norms");
    const int64_t nodes = number(1, kMostEntries, "the number of nodes");
    plan_.output = number(1, buffers - 1, "the output");
    for (int64_t i = 0; i < buffers; ++i) read_buffer();
    for (int64_t i = 0; i < norms; ++i) read_norm();
    read_norms_.resize(norms);
    for (int64_t i = 0; i < nodes; ++i) read_node(i);
    require_plan(position_ == length_, "the description is longer than its nodes");
    check_whole();
    return plan_;
  }

 private:
  static constexpr int64_t kMostEntries = 1 << 20;
  static constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

  int64_t next() {
    require_plan(position_ < length_, "the description ends too early");
    return data_[position_++];
  }

  int64_t number(int64_t least, int64_t most, const std::string& what) {
    const int64_t value = next();
    if (value < least || value > most)
      fail_plan(what + " is " + std::to_string(value) + ", expected " + std::to_string(least) +
                " to " + std::to_string(most));
    return value;
  }

  void read_buffer() {
    RawBuffer buffer{};
    buffer.channels = number(1, kMostChannels, "a buffer's number of channels");
    buffer.temporary = number(0, 1, "whether a buffer is temporary") != 0;
    channels_ += buffer.channels;
    require_plan(channels_ <= kMostChannels, "the buffers have over 2^24 channels together");
    plan_.buffers.push_back(buffer);
    written_.emplace_back(buffer.channels, plan_.buffers.size() == 1);
  }

  // Channels of one of the buffers from `first` on.
  void read_segment(int64_t first, int64_t& buffer, int64_t& channel, int64_t& channels) {
    buffer = number(first, static_cast<int64_t>(plan_.buffers.size()) - 1, "a buffer's index");
    const int64_t all = plan_.buffers[buffer].channels;
    channel = number(0, all - 1, "a first channel");
    channels = number(1, all - channel, "a number of channels");
  }

  void read_norm() {
    RawNorm norm{};
    read_segment(0, norm.buffer, norm.channel, norm.channels);
    plan_.norms.push_back(norm);
  }

  void read_node(int64_t index) {
    RawNode node{};
    node.kind = static_cast<RawKind>(number(0, 3, "a node's kind"));
    node.activation = number(0, 2, "an activation");
    read_segment(1, node.buffer, node.channel, node.channels);
    node.kernel = number(1, kMostSide, "a window's side");
    node.stride = number(1, kMost, "a stride");
    node.padding = number(0, node.kernel - 1, "a padding");
    const bool convolution = node.kind == RawKind::kConvolution;
    const int64_t reads = number(1, convolution ? kMostEntries : 1, "the number of reads");
    for (int64_t i = 0; i < reads; ++i) read_read(node, index);
    require_plan(node.input_channels <= kMostChannels, "a node reads over 2^24 channels");
    require_plan(convolution || node.input_channels == node.channels,
                 "a pool or depthwise convolution changes the number of channels");
    require_plan(node.kind != RawKind::kAveragePool || node.padding == 0,
                 "an average pool has padding");
    std::vector<bool>& written = written_[node.buffer];
    for (int64_t c = node.channel; c < node.channel + node.channels; ++c) {
      require_plan(!written[c], "two nodes write the same channel");
      written[c] = true;
    }
    plan_.buffers[node.buffer].writers.push_back(index);
    plan_.nodes.push_back(std::move(node));
  }

  void read_read(RawNode& node, int64_t index) {
    RawRead read{};
    read_segment(0, read.buffer, read.channel, read.channels);
    const std::vector<bool>& written = written_[read.buffer];
    const auto begin = written.begin() + read.channel;
    require_plan(std::find(begin, begin + read.channels, false) == begin + read.channels,
                 "a node reads what none before it writes");
    read.norm = number(-1, static_cast<int64_t>(plan_.norms.size()) - 1, "a norm's index");
    if (read.norm >= 0) {
      const RawNorm& norm = plan_.norms[read.norm];
      require_plan(norm.buffer == read.buffer && norm.channel == read.channel &&
                       norm.channels == read.channels,
                   "a read is of other channels than its norm");
      read_norms_[read.norm] = true;
    }
    plan_.buffers[read.buffer].readers.push_back(index);
    node.input_channels += read.channels;
    node.reads.push_back(read);
  }

  void check_whole() const {
    for (const bool read : read_norms_) require_plan(read, "nothing reads through a norm");
    for (size_t i = 0; i < plan_.buffers.size(); ++i) {
      const RawBuffer& buffer = plan_.buffers[i];
      const std::vector<bool>& written = written_[i];
      require_plan(std::find(written.begin(), written.end(), false) == written.end(),
                   "a channel of a buffer is written by no node");
      const bool output = static_cast<int64_t>(i) == plan_.output;
      require_plan(output || !buffer.readers.empty(), "nothing reads a buffer");
      if (!buffer.temporary) continue;
      require_plan(i > 0 && !output && buffer.writers.size() == 1,
                   "a temporary buffer is the input, the output, or written by several nodes");
      for (const RawRead& read : plan_.nodes[buffer.writers[0]].reads)
        require_plan(!plan_.buffers[read.buffer].temporary,
                     "a temporary buffer is written from another one");
    }
  }

  const int64_t* data_;
  int64_t length_;
  int64_t position_ = 0;
  int64_t channels_ = 0;
  RawPlan plan_;
  std::vector<std::vector<bool>> written_;  // channels of each buffer
  std::vector<bool> read_norms_;
};

}  // namespace

RawPlan read_raw_plan(const int64_t* description, int64_t length) {
  return Reader(description, length).read();
}

}  // namespace threshnet_fast::cpu
