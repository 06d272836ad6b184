/* The frame format of routing/wire/frame.py, which specifies it; a property test holds the two together. */

#ifndef EXPERTMESH_FRAME_H
#define EXPERTMESH_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "frames are little-endian and written as they lie in memory"
#endif

enum {
    HEADER_BYTES = 48,
    PAIR_BYTES = 12,
    MAX_MESSAGE_BYTES = 4096
};

typedef enum { KIND_DISPATCH = 1, KIND_COMBINE = 2, KIND_ERROR = 3 } frame_kind;

/* What a peer may ask us to allocate for one frame. */
typedef struct {
    uint64_t max_rows;
    uint64_t max_bytes;
    uint64_t max_pairs_per_row; /* at most UINT32_MAX, so that rows times it does not overflow */
} frame_limits;

typedef struct {
    uint8_t kind;
    uint8_t dtype;
    uint32_t layer;
    uint32_t rows;
    uint32_t pairs;
    uint32_t width;
    uint64_t epoch;
    uint64_t frame;
    uint32_t first;  /* dispatch, error: budget in ms; combine: us computed */
    uint32_t second; /* combine: us waited; otherwise 0 */
} frame_header;

/* Bytes of one number; 0 for a code that is none. */
size_t dtype_bytes(uint8_t code);

void pack_header(const frame_header *header, unsigned char *out);

/* Whether 48 bytes are the header of a frame within the limits; `header` is filled only then. */
bool parse_header(const unsigned char *data, const frame_limits *limits, frame_header *header);

/* Length of the body. Only for a header that was parsed, so that it can't overflow. */
uint64_t body_bytes(const frame_header *header);

#endif
