#include "frame.h"

#include <string.h>

static const unsigned char MAGIC[4] = {'X', 'M', 'S', 'H'};
enum { VERSION = 1 };

size_t dtype_bytes(uint8_t code)
{
    switch (code) {
    case 1: /* float32 */
        return 4;
    case 2: /* bfloat16 */
    case 3: /* float16 */
        return 2;
    default:
        return 0;
    }
}

void pack_header(const frame_header *header, unsigned char *out)
{
    memcpy(out, MAGIC, sizeof MAGIC);
    out[4] = VERSION;
    out[5] = header->kind;
    out[6] = header->dtype;
    out[7] = 0;
    memcpy(out + 8, &header->layer, 4);
    memcpy(out + 12, &header->rows, 4);
    memcpy(out + 16, &header->pairs, 4);
    memcpy(out + 20, &header->width, 4);
    memcpy(out + 24, &header->epoch, 8);
    memcpy(out + 32, &header->frame, 8);
    memcpy(out + 40, &header->first, 4);
    memcpy(out + 44, &header->second, 4);
}

static bool is_tensor_allowed(const frame_header *header, const frame_limits *limits)
{
    uint64_t row = (uint64_t)header->width * dtype_bytes(header->dtype);
    if (row == 0 || header->rows == 0 || header->rows > limits->max_rows)
        return false;
    if (header->kind == KIND_COMBINE ? header->pairs != 0
                                     : header->pairs == 0 || header->pairs > header->rows * limits->max_pairs_per_row)
        return false;
    uint64_t pairs = (uint64_t)header->pairs * PAIR_BYTES;
    return pairs <= limits->max_bytes && row <= (limits->max_bytes - pairs) / header->rows;
}

bool parse_header(const unsigned char *data, const frame_limits *limits, frame_header *header)
{
    if (memcmp(data, MAGIC, sizeof MAGIC) != 0 || data[4] != VERSION || data[7] != 0)
        return false;
    frame_header parsed = {.kind = data[5], .dtype = data[6]};
    memcpy(&parsed.layer, data + 8, 4);
    memcpy(&parsed.rows, data + 12, 4);
    memcpy(&parsed.pairs, data + 16, 4);
    memcpy(&parsed.width, data + 20, 4);
    memcpy(&parsed.epoch, data + 24, 8);
    memcpy(&parsed.frame, data + 32, 8);
    memcpy(&parsed.first, data + 40, 4);
    memcpy(&parsed.second, data + 44, 4);
    if (parsed.kind < KIND_DISPATCH || parsed.kind > KIND_ERROR || (parsed.second != 0 && parsed.kind != KIND_COMBINE))
        return false;
    if (parsed.kind == KIND_ERROR ? parsed.rows > MAX_MESSAGE_BYTES || parsed.dtype != 0 || parsed.width != 0
                                  : !is_tensor_allowed(&parsed, limits))
        return false;
    *header = parsed;
    return true;
}

uint64_t body_bytes(const frame_header *header)
{
    if (header->kind == KIND_ERROR)
        return header->rows;
    uint64_t tensor = (uint64_t)header->rows * header->width * dtype_bytes(header->dtype);
    return header->kind == KIND_DISPATCH ? tensor + (uint64_t)header->pairs * PAIR_BYTES : tensor;
}
