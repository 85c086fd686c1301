"""CUDA source of the kernels: what stands between two matrix products, in one pass over memory each.

Written without headers, since those are not on every machine that has a GPU. TYPE (0 float, 1 half, 2 bfloat16), CLAMP
and COLUMNS (columns of the context a lane takes) are defined in front of it.
"""

SOURCE = r"""
#if TYPE == 0
typedef float T;
__device__ __forceinline__ float up(T x) { return x; }
__device__ __forceinline__ T down(float x) { return x; }
#elif TYPE == 1
typedef unsigned short T;
__device__ __forceinline__ float up(T x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
__device__ __forceinline__ T down(float x) { T y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
#else
typedef unsigned short T;
__device__ __forceinline__ float up(T x) { return __uint_as_float((unsigned)x << 16); }
__device__ __forceinline__ T down(float x) {
  unsigned u = __float_as_uint(x);
  return x != x ? 0x7fff : (T)((u + 0x7fff + ((u >> 16) & 1)) >> 16);  // to the nearest, ties to even
}
#endif

#define R __restrict__
const int PACK = 16 / sizeof(T);
struct __align__(16) Values { T of[PACK]; };
struct __align__(2 * PACK) Bits { short of[PACK]; };

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float warp_sum(float x) {
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// out = keep ? relu(y + add) : 0; y, out (rows, width), add (rows, width) or, with stride 0, (width);
// bits (rows, width) and step (2): dropout's, read if `drops`
extern "C" __global__ void activate(const T* R y, const T* R add, int stride, const short* R bits,
                                    const short* R step, int drops, int threshold, T* R out, int packs, int width) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= packs) return;
  int per_row = width / PACK, row = i / per_row, column = (i - row * per_row) * PACK;
  Values a = ((const Values*)y)[i];
  Values b = *(const Values*)(add + (long long)row * stride + column);
  Bits x;
  int factor = 0, shift = 0;
  if (drops) {
    x = ((const Bits*)bits)[i];
    factor = step[0];
    shift = step[1];
  }
  for (int k = 0; k < PACK; k++) {
    float value = up(a.of[k]) + up(b.of[k]);
    value = value < 0.0f ? 0.0f : value;  // NaN stays NaN
    bool keep = !drops || (short)(x.of[k] * factor + shift) >= threshold;
    a.of[k] = keep ? down(value) : (T)0;
  }
  ((Values*)out)[i] = a;
}

// gates, LayerNorm and clamp, a row a warp: heads (rows, 3C); state (B, C) is read and replaced; after (rows, C),
// mean and rstd (rows) are kept; read (next_rows, C) is what the next step's product reads
extern "C" __global__ void cell_forward(const T* R heads, float* R state, const float* R norm,
                                        const float* R norm_bias, float* R after, float* R mean_out,
                                        float* R rstd_out, T* R read, int next_rows, int rows) {
  const int C = 32 * COLUMNS;
  int lane = threadIdx.x & 31, row = (blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  if (row >= rows) return;
  const T* head = heads + (long long)row * 3 * C;
  float mixed[COLUMNS], sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int k = 0; k < COLUMNS; k++) {
    int c = lane + 32 * k;
    float candidate = up(head[c]), forget = sigmoid(up(head[C + c])), write = sigmoid(up(head[2 * C + c]));
    mixed[k] = forget * state[(long long)row * C + c] + write * candidate;
    sum += mixed[k];
  }
  float mean = warp_sum(sum) / C;
#pragma unroll
  for (int k = 0; k < COLUMNS; k++) squares += (mixed[k] - mean) * (mixed[k] - mean);
  float rstd = rsqrtf(warp_sum(squares) / C + 1e-5f);
#pragma unroll
  for (int k = 0; k < COLUMNS; k++) {
    int c = lane + 32 * k;
    float value = (mixed[k] - mean) * rstd * norm[c] + norm_bias[c];
    value = value < -CLAMP ? -CLAMP : value > CLAMP ? CLAMP : value;
    state[(long long)row * C + c] = value;
    after[(long long)row * C + c] = value;
    if (row < next_rows) read[(long long)row * C + c] = down(value);
  }
  if (lane == 0) {
    mean_out[row] = mean;
    rstd_out[row] = rstd;
  }
}

// the same backwards, rows in turn for each of `warps` warps. The gradient of the context is carry + product, product
// (next_rows, C) being what the next step's layers gave and carry (B, C) the rest, replaced by what passes the forget
// gate; delta (rows, 3C): gradient of the heads; sums (2, warps, C): added to, the gradients of norm and norm_bias
extern "C" __global__ void cell_backward(const T* R heads, const float* R before, const float* R after,
                                         const float* R means, const float* R rstds, const float* R norm,
                                         const T* R product, float* R carry, T* R delta, float* R sums, int next_rows,
                                         int rows, int warps) {
  const int C = 32 * COLUMNS;
  int lane = threadIdx.x & 31, warp = (blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  if (warp >= warps) return;
  float sum_norm[COLUMNS], sum_bias[COLUMNS];
#pragma unroll
  for (int k = 0; k < COLUMNS; k++) sum_norm[k] = sum_bias[k] = 0.0f;
  for (int row = warp; row < rows; row += warps) {
    const T* head = heads + (long long)row * 3 * C;
    T* out = delta + (long long)row * 3 * C;
    float mean = means[row], rstd = rstds[row], first = 0.0f, second = 0.0f;
    float state[COLUMNS], candidate[COLUMNS], forget[COLUMNS], write[COLUMNS], scaled[COLUMNS], normed[COLUMNS];
  #pragma unroll
  for (int k = 0; k < COLUMNS; k++) {
      int c = lane + 32 * k;
      long long place = (long long)row * C + c;
      state[k] = before[place];
      candidate[k] = up(head[c]);
      forget[k] = sigmoid(up(head[C + c]));
      write[k] = sigmoid(up(head[2 * C + c]));
      normed[k] = (forget[k] * state[k] + write[k] * candidate[k] - mean) * rstd;
      float grad = carry[place] + (row < next_rows ? up(product[place]) : 0.0f);
      if (after[place] <= -CLAMP || after[place] >= CLAMP) grad = 0.0f;
      sum_norm[k] += grad * normed[k];
      sum_bias[k] += grad;
      scaled[k] = grad * norm[c];
      first += scaled[k];
      second += scaled[k] * normed[k];
    }
    first = warp_sum(first) / C;
    second = warp_sum(second) / C;
  #pragma unroll
  for (int k = 0; k < COLUMNS; k++) {
      int c = lane + 32 * k;
      float grad = rstd * (scaled[k] - first - normed[k] * second);
      out[c] = down(grad * write[k]);
      out[C + c] = down(grad * state[k] * forget[k] * (1.0f - forget[k]));
      out[2 * C + c] = down(grad * candidate[k] * write[k] * (1.0f - write[k]));
      carry[(long long)row * C + c] = grad * forget[k];
    }
  }
#pragma unroll
  for (int k = 0; k < COLUMNS; k++) {
    int c = lane + 32 * k;
    sums[(long long)warp * C + c] += sum_norm[k];
    sums[((long long)warps + warp) * C + c] += sum_bias[k];
  }
}

// a row a block of 128: logits (rows, vocab) are replaced by softmax - onehot, nll (rows) is kept; a target of 0 is
// padding, whose row becomes zeros
extern "C" __global__ void losses(T* R logits, const long long* R targets, float* R nll, int vocab) {
  __shared__ float part[8];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  T* row = logits + (long long)blockIdx.x * vocab;
  int target = (int)targets[blockIdx.x];
  if (target == 0) {
    for (int v = threadIdx.x; v < vocab; v += 128) row[v] = (T)0;
    if (threadIdx.x == 0) nll[blockIdx.x] = 0.0f;
    return;
  }
  float wanted = up(row[target]), largest = wanted, total = 0.0f;
  for (int v = threadIdx.x; v < vocab; v += 128) largest = fmaxf(largest, up(row[v]));
  for (int step = 16; step; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  if (lane == 0) part[warp] = largest;
  __syncthreads();
  largest = fmaxf(fmaxf(part[0], part[1]), fmaxf(part[2], part[3]));
  for (int v = threadIdx.x; v < vocab; v += 128) total += expf(up(row[v]) - largest);
  total = warp_sum(total);
  if (lane == 0) part[4 + warp] = total;
  __syncthreads();
  total = part[4] + part[5] + part[6] + part[7];
  float norm = largest + logf(total);
  for (int v = threadIdx.x; v < vocab; v += 128) {
    float share = expf(up(row[v]) - norm);
    row[v] = down(v == target ? share - 1.0f : share);
  }
  if (threadIdx.x == 0) nll[blockIdx.x] = norm - wanted;
}
"""
