/* What gcc's -fsanitize-coverage=trace-pc calls at every edge: counts of pairs of edges, in a map as small as the code.
   Not compiled with coverage itself. */

#include <stdint.h>

enum { MAP_BITS = 13, MAP_BYTES = 1 << MAP_BITS };

__attribute__((visibility("default"))) uint8_t coverage_map[MAP_BYTES];

static uintptr_t previous;

void __sanitizer_cov_trace_pc(void);

void __sanitizer_cov_trace_pc(void)
{
    /* Relative to this function, so that an edge has the same place in every process. */
    uint64_t here = (uint64_t)__builtin_return_address(0) - (uint64_t)(uintptr_t)&__sanitizer_cov_trace_pc;
    here = here * UINT64_C(0x9E3779B97F4A7C15) >> (64 - MAP_BITS);
    uint8_t *count = &coverage_map[here ^ previous];
    *count = *count == UINT8_MAX ? UINT8_MAX : (uint8_t)(*count + 1);
    previous = here >> 1;
}
