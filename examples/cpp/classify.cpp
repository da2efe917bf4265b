// Classifies images with a saved network, without Python and without PyTorch.
//
//     python -c "import threshnet_fast as tf
//     tf.save_plan(tf.ThreshNet95().eval(), (1, 3, 224, 224), 'threshnet95.plan')"
//     ./classify threshnet95.plan images.bin
//
// images.bin holds float32 numbers in the order N, C, H, W; the logits of each image are printed.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "threshnet_fast.h"

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

void check(int status) {
  if (status != THRESHNET_FAST_SUCCESS) throw std::runtime_error(threshnet_fast_last_error());
}

int64_t size_of(const int64_t (&shape)[4]) { return shape[0] * shape[1] * shape[2] * shape[3]; }

std::vector<float> read_floats(const char* path, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(values.data()),
            static_cast<std::streamsize>(values.size() * sizeof(float)));
  if (!file)
    throw std::runtime_error(std::string(path) + " does not hold " + std::to_string(count) +
                             " float32 numbers");
  return values;
}

void classify(const char* plan, const char* images) {
  threshnet_fast_network* network = nullptr;
  check(threshnet_fast_load(plan, THRESHNET_FAST_FLOAT32, 0, &network));
  int64_t input_shape[4], output_shape[4];
  check(threshnet_fast_shapes(network, input_shape, output_shape));
  const std::vector<float> input = read_floats(images, size_of(input_shape));
  std::vector<float> output(static_cast<size_t>(size_of(output_shape)));
  const size_t input_bytes = input.size() * sizeof(float);
  const size_t output_bytes = output.size() * sizeof(float);

  void* device_input = nullptr;
  void* device_output = nullptr;
  cudaStream_t stream = nullptr;
  check(cudaMalloc(&device_input, input_bytes));
  check(cudaMalloc(&device_output, output_bytes));
  check(cudaStreamCreate(&stream));
  check(cudaMemcpyAsync(device_input, input.data(), input_bytes, cudaMemcpyHostToDevice, stream));
  check(threshnet_fast_run(network, device_input, device_output, stream));
  check(
      cudaMemcpyAsync(output.data(), device_output, output_bytes, cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));

  const size_t classes = static_cast<size_t>(output_shape[1]);
  for (size_t image = 0; image < output.size() / classes; ++image) {
    for (size_t i = 0; i < classes; ++i)
      std::printf("%.9g%c", static_cast<double>(output[image * classes + i]),
                  i + 1 < classes ? ' ' : '\n');
  }
  check(cudaStreamDestroy(stream));
  check(cudaFree(device_input));
  check(cudaFree(device_output));
  threshnet_fast_free(network);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s PLAN IMAGES\n", argv[0]);
    return 2;
  }
  try {
    classify(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
