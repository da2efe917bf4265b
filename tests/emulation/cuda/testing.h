// Launchers under names, for tests that are no C++: see cuda_library.py.
#pragma once

#include <array>
#include <cstddef>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace emulation {

struct Launcher {
  const char* name;
  std::vector<size_t> argument_bytes;
  size_t result_bytes;
  // Calls it with arguments and a result of those sizes.
  void (*call)(void (*function)(), const void* const* arguments, void* result);
  void (*function)();
};

inline std::vector<Launcher>& launchers() {
  static std::vector<Launcher> all;
  return all;
}

template <typename Result, typename... Arguments, size_t... index>
void call_launcher(Result (*function)(Arguments...), const void* const* arguments,
                   [[maybe_unused]] void* result, std::index_sequence<index...>) {
  const auto run = [&] {
    return function(*static_cast<const std::decay_t<Arguments>*>(arguments[index])...);
  };
  if constexpr (std::is_void_v<Result>) {
    run();
  } else {
    const Result value = run();
    std::memcpy(result, &value, sizeof(Result));
  }
}

// Makes a function known by a name, from where a variable of this type is defined. Nothing where
// it is null: a weak function that no source defines.
class Exported {
 public:
  template <typename Result, typename... Arguments>
  Exported(const char* name, Result (*function)(Arguments...)) {
    if (function == nullptr) return;
    using Function = Result (*)(Arguments...);
    size_t result_bytes = 0;
    if constexpr (!std::is_void_v<Result>) result_bytes = sizeof(Result);
    launchers().push_back({name,
                           {sizeof(std::decay_t<Arguments>)...},
                           result_bytes,
                           [](void (*erased)(), const void* const* arguments, void* result) {
                             call_launcher(reinterpret_cast<Function>(erased), arguments, result,
                                           std::index_sequence_for<Arguments...>());
                           },
                           reinterpret_cast<void (*)()>(function)});
  }
};

}  // namespace emulation

extern "C" {

// Calls a launcher. Returns 0, or what it threw: 1 std::invalid_argument, 2 emulation::Error, 3
// another exception, 4 where the name or the sizes are not those of a launcher; `text`, of
// `text_bytes`, then says more.
int emulation_call(const char* name, const void* const* arguments, const size_t* argument_bytes,
                   size_t argument_count, void* result, size_t result_bytes, char* text,
                   size_t text_bytes);
}
