/* cada_seg: label camera frames with a segmentation model, in C++ alone, for small computers such
 * as the Jetson. The labels are those of `cada-deploy predict`, byte for byte, through the same
 * engine (docs/cada_seg.md says what is covered and what never ran).
 *
 * C ABI: plain pointers and integers, no exceptions, no Python. Every function that can fail
 * returns a CADA_SEG_* code, the exit code that the program would end with; cada_seg_error() then
 * holds the sentence, of this thread. One open model is for one thread at a time; open several for
 * several threads. Structs begin with their size, so that later versions can append to them. */
#ifndef CADA_SEG_H
#define CADA_SEG_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  CADA_SEG_DONE = 0,
  CADA_SEG_FAILED = 1,    /* on the way: disk full, lost device, no memory */
  CADA_SEG_USAGE = 2,     /* an argument or a spec that makes no sense, a model without a spec */
  CADA_SEG_LACKS = 3,     /* the machine or this build lacks an engine, a library, a decoder */
  CADA_SEG_MISMATCH = 4,  /* an artefact does not fit: model, engine, spec, class count, digest */
  CADA_SEG_REJECTED = 6   /* this one image or frame gets no label; the next one may */
};

/* An open model with its buffers. */
typedef struct cada_seg cada_seg;

typedef struct cada_seg_options {
  size_t size;              /* sizeof(cada_seg_options) */
  const char *model;        /* M.onnx ("ort"), M.engine with its M.engine.json ("trt") */
  const char *spec;         /* JSON file: a ModelSpec or an engine's manifest; NULL = the model's */
  const char *backend;      /* "ort" or "trt"; NULL = "ort" */
  const char *ort_library;  /* path of libonnxruntime.so; NULL = CADA_ORT_LIBRARY, then the linker's */
  int32_t threads;          /* of the network (ort) and of the fused kernel, for one frame; >= 1 */
  int32_t device;           /* CUDA device ("trt") */
  int32_t input_height;     /* of the network, for a model of any size; 0 = the frame's own */
  int32_t input_width;
} cada_seg_options;

typedef struct cada_seg_image { /* RGB, 8 bits a channel */
  const uint8_t *pixels;
  int32_t height, width;
  int64_t row_bytes;        /* from one row to the next; 0 = 3 * width */
} cada_seg_image;

typedef struct cada_seg_result {
  size_t size;              /* sizeof(cada_seg_result) */
  int32_t height, width;    /* of the labels; 0, 0 = the frame's */
  uint8_t *labels;          /* (height, width) train ids, 255 = invalid; the caller's */
  float *entropy;           /* (height, width) nats, NaN = invalid; may be NULL */
  float *confidence;        /* (height, width), NaN = invalid; may be NULL */
  /* Filled in: */
  int64_t invalid;          /* pixels without a finite score */
  double preprocess_ms, network_ms, encode_ms, fuse_ms;
} cada_seg_result;

/* Everything is checked before an engine is loaded: the file, its spec, its digest where the
 * manifest has one. *model is NULL after a failure. */
int cada_seg_open(const cada_seg_options *options, cada_seg **model);
void cada_seg_close(cada_seg *model); /* NULL is allowed */

/* CADA_SEG_REJECTED: no pixel had a finite score. */
int cada_seg_label(cada_seg *model, const cada_seg_image *frame, cada_seg_result *result);

const char *cada_seg_backend(const cada_seg *model); /* "onnxruntime 1.32.0", "tensorrt 10.3.0.30" */
const char *cada_seg_isa(void);                      /* of the fused kernel: "avx2", "scalar" */
int32_t cada_seg_classes(const cada_seg *model);     /* 0 = known after the first frame */

/* What the spec (JSON text) makes of a frame: the network's input of (height, width), 0, 0 = the
 * frame's own. row is the caller's, row_bytes its size; too small is CADA_SEG_USAGE. */
int cada_seg_preprocess(const char *spec_json, const cada_seg_image *frame, int32_t height,
                        int32_t width, void *row, size_t row_bytes);

typedef struct cada_seg_picture { /* RGB, rows without gaps; freed by cada_seg_free_picture */
  uint8_t *pixels;
  int32_t height, width;
} cada_seg_picture;

/* The bytes of a PNG or JPEG, strictly: CADA_SEG_REJECTED with "reason: detail" for a damaged, cut
 * or oversized file and for every other format. The reasons are those of rejected.jsonl. */
int cada_seg_decode(const uint8_t *data, size_t bytes, cada_seg_picture *picture);
void cada_seg_free_picture(cada_seg_picture *picture);

const char *cada_seg_error(void); /* of this thread's last failure; "" before the first */
int cada_seg_abi(void);           /* 1 */

#ifdef __cplusplus
}
#endif
#endif
