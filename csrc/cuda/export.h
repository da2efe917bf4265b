// What other libraries may call of this one; all else is hidden.
#pragma once

#define THRESHNET_FAST_EXPORT __attribute__((visibility("default")))
