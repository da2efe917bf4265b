#include <algorithm>
#include <cmath>

#include "steps.h"

namespace threshnet_fast::cpu {

void combine_moments(const float* moments, const std::vector<int64_t>& counts, int64_t channels,
                     int64_t first, int64_t last, const Statistics& statistics) {
  for (int64_t c = first; c < last; ++c) {
    double mean = 0, squares = 0, total = 0;
    for (size_t i = 0; i < counts.size(); ++i) {
      const float* const part = moments + static_cast<int64_t>(i) * 3 * channels + c;
      const double count = static_cast<double>(counts[i]);
      const double shifted = part[channels];
      const double part_mean = part[0] + shifted / count;
      const double difference = part_mean - mean;
      const double sum = total + count;
      mean += difference * count / sum;
      squares += part[2 * channels] - shifted * shifted / count +
                 difference * difference * total * count / sum;
      total = sum;
    }
    statistics.mean[c] = static_cast<float>(mean);
    // A NaN stays a NaN.
    statistics.variance[c] = static_cast<float>(squares < 0 ? 0 : squares / total);
  }
}

void normalization_prologue(const Normalization& norm, int64_t channels, float* scale,
                            float* shift) {
  for (int64_t c = 0; c < channels; ++c) {
    const double gamma = norm.gamma == nullptr ? 1.0 : norm.gamma[c];
    const double beta = norm.beta == nullptr ? 0.0 : norm.beta[c];
    const double factor = gamma / std::sqrt(norm.variance[c] + norm.eps);
    scale[c] = static_cast<float>(factor);
    shift[c] = static_cast<float>(beta - norm.mean[c] * factor);
  }
}

void normalization_backward(const NormalizationBackward& step, int64_t channels) {
  const Normalization& norm = step.norm;
  for (int64_t c = 0; c < channels; ++c) {
    const double sum = step.sums[c];
    const double moment = step.sums[step.sums_pitch + c];
    const double reciprocal = 1.0 / std::sqrt(norm.variance[c] + norm.eps);
    if (step.gamma_gradient != nullptr)
      step.gamma_gradient[c] = static_cast<float>(moment * reciprocal);
    if (step.beta_gradient != nullptr) step.beta_gradient[c] = static_cast<float>(sum);
    if (step.slope == nullptr) continue;
    const double gamma = norm.gamma == nullptr ? 1.0 : norm.gamma[c];
    const double scale = gamma * reciprocal / static_cast<double>(step.count);
    const double slope = scale * reciprocal * reciprocal * moment;
    step.slope[c] += static_cast<float>(slope);
    step.offset[c] += static_cast<float>(norm.mean[c] * slope - scale * sum);
  }
}

}  // namespace threshnet_fast::cpu
