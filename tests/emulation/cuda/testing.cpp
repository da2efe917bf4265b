#include "testing.h"

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>

#include "host_cuda.h"

namespace {

enum Outcome { kDone = 0, kInvalidArgument = 1, kEmulationError = 2, kException = 3, kNoSuch = 4 };

Outcome report(Outcome outcome, const std::string& what, char* text, size_t bytes) {
  const size_t length = std::min(what.size(), bytes - 1);
  std::memcpy(text, what.data(), length);
  text[length] = '\0';
  return outcome;
}

}  // namespace

int emulation_call(const char* name, const void* const* arguments, const size_t* argument_bytes,
                   size_t argument_count, void* result, size_t result_bytes, char* text,
                   size_t text_bytes) {
  const auto& all = emulation::launchers();
  const auto found = std::find_if(all.begin(), all.end(), [&](const emulation::Launcher& each) {
    return std::strcmp(each.name, name) == 0;
  });
  if (found == all.end())
    return report(kNoSuch, std::string("this library has no ") + name, text, text_bytes);
  if (found->result_bytes != result_bytes || found->argument_bytes.size() != argument_count ||
      !std::equal(argument_bytes, argument_bytes + argument_count, found->argument_bytes.begin())) {
    std::string what = std::string(name) + " takes arguments of";
    for (size_t bytes : found->argument_bytes) what += " " + std::to_string(bytes);
    what += " bytes and returns " + std::to_string(found->result_bytes);
    return report(kNoSuch, what, text, text_bytes);
  }
  try {
    found->call(found->function, arguments, result);
  } catch (const std::invalid_argument& error) {
    return report(kInvalidArgument, error.what(), text, text_bytes);
  } catch (const emulation::Error& error) {
    return report(kEmulationError, error.what(), text, text_bytes);
  } catch (const std::exception& error) {
    return report(kException, error.what(), text, text_bytes);
  }
  return kDone;
}
