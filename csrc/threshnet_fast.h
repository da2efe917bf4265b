/* threshnet_fast in C: runs a network that threshnet_fast.save_plan wrote on an NVIDIA GPU, without
 * Python and without PyTorch. Link with libthreshnet_fast_cuda.so.
 *
 *     threshnet_fast_network* network = NULL;
 *     if (threshnet_fast_load("threshnet95.plan", THRESHNET_FAST_FLOAT16, 0, &network) != 0)
 *       fprintf(stderr, "%s\n", threshnet_fast_last_error());
 *     threshnet_fast_run(network, images, logits, stream);
 *     threshnet_fast_free(network);
 */
#ifndef THRESHNET_FAST_H
#define THRESHNET_FAST_H

#include <stdint.h>

#define THRESHNET_FAST_VERSION "0.1.0"

#if defined(_WIN32)
#define THRESHNET_FAST_API
#else
#define THRESHNET_FAST_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* What a network computes in; also the type of its input and output. Sums are always float32, and
 * float32 is never rounded to TF32. bfloat16 needs compute capability 8.0. */
enum threshnet_fast_dtype {
  THRESHNET_FAST_FLOAT32 = 0,
  THRESHNET_FAST_FLOAT16 = 1,
  THRESHNET_FAST_BFLOAT16 = 2
};

/* What functions return: 0, or why they did not do what they were asked to. */
enum threshnet_fast_status {
  THRESHNET_FAST_SUCCESS = 0,
  THRESHNET_FAST_INVALID_ARGUMENT = 1, /* an argument, or the file, is not what was expected */
  THRESHNET_FAST_FAILURE = 2           /* CUDA, the file system or the memory failed */
};

/* A network on one device, with its weights and the memory of one call. */
typedef struct threshnet_fast_network threshnet_fast_network;

/* The version of the library; THRESHNET_FAST_VERSION is that of this header. */
THRESHNET_FAST_API const char* threshnet_fast_version(void);

/* What the latest function that failed in this thread has to say; empty before. Valid until the
 * next one fails. */
THRESHNET_FAST_API const char* threshnet_fast_last_error(void);

/* Reads a network from a file and prepares it for a device: copies and packs its weights, chooses
 * its kernels. Waits for the device. On failure *network is NULL. */
THRESHNET_FAST_API int threshnet_fast_load(const char* path, int dtype, int device,
                                           threshnet_fast_network** network);

/* The shapes [N, C, H, W] of a network's input and output; a classifier's output has H = W = 1. */
THRESHNET_FAST_API int threshnet_fast_shapes(const threshnet_fast_network* network,
                                             int64_t input[4], int64_t output[4]);

/* Runs a network. Input and output are on its device, of its dtype and shapes: the input contiguous
 * in the order N, C, H, W, the output in the order N, H, W, C. Launches all kernels on a stream
 * (a cudaStream_t, NULL for the default one) and returns without waiting for them; a CUDA graph can
 * capture it. Calls with one network must follow each other on one stream: they share its memory.
 */
THRESHNET_FAST_API int threshnet_fast_run(threshnet_fast_network* network, const void* input,
                                          void* output, void* stream);

/* Frees a network; NULL is allowed. Its calls must have ended. */
THRESHNET_FAST_API void threshnet_fast_free(threshnet_fast_network* network);

#ifdef __cplusplus
}
#endif

#endif
