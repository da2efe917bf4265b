// A seal on a compiled program. Whoever runs a program trusts each of its offsets, so that a
// changed byte would be a read or write anywhere; and its bytes are those of one version of one
// library, so that no other process has a use for them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>

namespace threshnet_fast {

// Of this library in this process and in what it forks.
inline uint64_t seal_key() {
  static const uint64_t key = [] {
    std::random_device random;
    return uint64_t{random()} << 32 | random();
  }();
  return key;
}

// Two sums over the 64-bit words, the second one of the first's steps, in lanes that fill vectors:
// a word that changes, changes the sum of its lane. Not against whoever knows the key, who writes
// in this process anyway. As fast as its bytes can be read.
inline uint64_t seal_of(const std::byte* bytes, int64_t size) {
  constexpr int64_t kLanes = 8;
  constexpr int64_t kBlock = kLanes * sizeof(uint64_t);
  uint64_t sums[kLanes] = {};
  uint64_t totals[kLanes] = {};
  const auto add = [&](const std::byte* block) {
    for (int64_t i = 0; i < kLanes; ++i) {
      uint64_t word;
      std::memcpy(&word, block + i * sizeof word, sizeof word);
      sums[i] += word;
      totals[i] += sums[i];
    }
  };
  int64_t position = 0;
  for (; position + kBlock <= size; position += kBlock) add(bytes + position);
  std::byte rest[kBlock] = {};
  if (position < size) std::memcpy(rest, bytes + position, size - position);
  add(rest);
  uint64_t seal = seal_key() ^ static_cast<uint64_t>(size);
  const auto mix = [&](uint64_t value) {
    seal = (seal ^ value) * 0x9e3779b97f4a7c15u;
    seal ^= seal >> 32;
  };
  for (int64_t i = 0; i < kLanes; ++i) {
    mix(sums[i]);
    mix(totals[i]);
  }
  return seal;
}

// A program begins with a header of type Header, of which the member `seal` says what follows it.
template <typename Header>
uint64_t seal_of_program(const void* bytes, int64_t size) {
  constexpr int64_t first = offsetof(Header, seal) + sizeof(Header::seal);
  return seal_of(static_cast<const std::byte*>(bytes) + first, size - first);
}

// Seals a finished program.
template <typename Header>
void seal_program(void* bytes, int64_t size) {
  const uint64_t seal = seal_of_program<Header>(bytes, size);
  std::memcpy(static_cast<std::byte*>(bytes) + offsetof(Header, seal), &seal, sizeof seal);
}

// Whether this process sealed a program of that magic number and version, and nothing in it was
// changed since.
template <typename Header>
bool is_sealed(const void* bytes, int64_t size, int64_t magic, int64_t version) {
  if (size < static_cast<int64_t>(sizeof(Header)) ||
      reinterpret_cast<uintptr_t>(bytes) % alignof(Header) != 0)
    return false;
  const Header& header = *static_cast<const Header*>(bytes);
  return header.magic == magic && header.version == version && header.bytes == size &&
         header.seal == seal_of_program<Header>(bytes, size);
}

}  // namespace threshnet_fast
