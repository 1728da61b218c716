// What the kernels offer: plain functions over pointers and sizes, on the host and on the device. Knows no torch.
//
// x is always a contiguous [rows, channels] matrix. "acc" is the dtype of every per-channel number: float64
// when x is float64, float32 otherwise. What each operation computes is written in channel_math.h (the
// vectors of length channels) and at the top of each kernel (the passes over the matrix).
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

#ifdef __CUDACC__
#define NORMFUSE_BOTH __host__ __device__
#else
#define NORMFUSE_BOTH
#endif

namespace normfuse {

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

struct Matrix {
  int64_t rows;
  int64_t channels;
  DType dtype;
};

struct UnifiedForward {
  Matrix shape;
  const void* x;
  const bool* pad_mask;  // [rows], true = padding; null: no padding
  const void* weight;    // acc [channels]
  const void* bias;      // acc [channels]
  int64_t window;
  int64_t warmup_iters;
  bool outlier_filtration;
  double eps;
  double momentum;
  // state, moved in place
  void* running_var;      // acc [channels]
  void* buffer_x2;        // acc [window, channels]
  int64_t* iters;         // [1]
  int64_t* skip_counter;  // [1]
  // results
  void* y;        // like x
  void* stats;    // acc [2, channels]: 1/sqrt(var + eps), r
  int64_t* step;  // [2]: t, or 0 where no row is valid; skip
  // s = x + residual is normalised instead of x, and written; both null: x is
  const void* residual;  // like x
  void* s;               // like x
};

struct UnifiedBackward {
  Matrix shape;
  const void* grad_y;  // like x
  const void* x;
  const void* weight;   // acc [channels]
  const void* stats;    // from the forward
  const int64_t* step;  // from the forward
  int64_t window;
  int64_t warmup_iters;
  double momentum;
  // state, moved in place
  void* ema_gz;     // acc [channels]
  void* buffer_gz;  // acc [window, channels]
  // results
  void* grad_x;        // like x
  void* grad_weight;   // acc [channels]
  void* grad_bias;     // acc [channels]
  const void* grad_s;  // like x, added to grad_x; null: none
};

struct PowerForward {
  Matrix shape;
  const void* x;
  const bool* pad_mask;  // [rows], true = padding; null: no padding
  const void* weight;    // acc [channels]
  const void* bias;      // acc [channels]
  int64_t warmup_iters;
  int64_t group_num;  // groups of the group scaling, a divisor of channels; 0 = no group scaling
  double eps;
  double group_eps;  // the group scaling's own
  double alpha_fwd;
  // state, moved in place
  void* running_phi;  // acc [channels]
  int64_t* iters;     // [1]
  // results
  void* y;          // like x
  void* stats;      // acc [3, channels]: 1/sqrt of what z used, 1/sqrt(q + eps), mean over all rows of scaled x
                    // squared (not a number where no row is valid: the backward then moves nothing)
  void* row_scale;  // acc [rows, group_num]
  // s = x + residual is normalised instead of x, and written; both null: x is
  const void* residual;  // like x
  void* s;               // like x
};

struct PowerBackward {
  Matrix shape;
  const void* grad_y;  // like x
  const void* x;
  const void* weight;     // acc [channels]
  const void* stats;      // from the forward
  const void* row_scale;  // from the forward
  int64_t group_num;
  double alpha_bkw;
  bool paper;  // divide by the statistic the forward used instead of the batch's
  // state, moved in place
  void* ema_gz;  // acc [channels]
  // results
  void* grad_x;        // like x
  void* grad_weight;   // acc [channels]
  void* grad_bias;     // acc [channels]
  const void* grad_s;  // like x, added to grad_x; null: none
};

// LayerNorm and its relatives, with an optional residual added first: s = x + residual, y = w (s - m) inv_std + b
// per row. row_math.h says what m and inv_std are.
enum class RowNorm { kLayer, kRms, kCentredRms };

struct RowNormForward {
  Matrix shape;
  const void* x;
  const void* residual;  // like x; null: s is x
  const void* weight;    // acc [channels]; null: 1
  const void* bias;      // acc [channels]; null: 0
  RowNorm kind;
  double eps;
  // results
  void* y;        // like x
  void* s;        // like x; null without a residual
  void* inv_std;  // acc [rows]
  void* mean;     // acc [rows]; null for RMSNorm
};

struct RowNormBackward {
  Matrix shape;
  const void* grad_y;   // like x
  const void* grad_s;   // like x, added to grad_x; null: none
  const void* s;        // like x
  const void* weight;   // acc [channels]; null: 1
  const void* inv_std;  // from the forward
  const void* mean;     // from the forward
  RowNorm kind;
  // results
  void* grad_x;       // like x; the gradient of the residual too
  void* grad_weight;  // acc [channels]
  void* grad_bias;    // acc [channels]
};

// Dynamic Tanh and Dynamic erf: y = w f(u) + b at every point, with u = alpha x + shift and f the curve of
// curve_math.h; alpha and shift are one number each.
enum class Curve { kTanh, kErf };

struct DynamicActivationForward {
  Matrix shape;
  const void* x;
  const void* alpha;   // acc [1]
  const void* shift;   // acc [1]; null: 0
  const void* weight;  // acc [channels]
  const void* bias;    // acc [channels]
  Curve curve;
  // results
  void* y;  // like x
};

struct DynamicActivationBackward {
  Matrix shape;
  const void* grad_y;  // like x
  const void* x;
  const void* alpha;   // acc [1]
  const void* shift;   // acc [1]; null: 0
  const void* weight;  // acc [channels]
  Curve curve;
  // results
  void* grad_x;       // like x
  void* grad_alpha;   // acc [1]
  void* grad_shift;   // acc [1]
  void* grad_weight;  // acc [channels]
  void* grad_bias;    // acc [channels]
};

// Batch normalisation and its kin. x is [samples, channels, positions], contiguous. Every group_size consecutive samples
// make a group, a rest joins the last one. A statistics group, whose numbers share statistics, is one channel of one
// group, or, where the mask parts two regions, one channel of one region of one group. stat_group_math.h has the algebra.
struct StatGroups {
  int64_t samples;
  int64_t channels;
  int64_t positions;
  DType dtype;
  int64_t group_size;
  const bool* mask;  // [samples, positions]; null: none
  bool regions;      // the mask parts two regions; otherwise true = padding, which no statistic counts

  NORMFUSE_BOTH int64_t groups() const { return samples / 2 < group_size ? 1 : samples / group_size; }
  NORMFUSE_BOTH int64_t sets() const { return mask && regions ? 2 : 1; }  // of statistics in a group
};

// A number per statistics group, acc [groups, sets, channels], or the same for all groups or sets where that stride is 0.
struct PerStatGroup {
  const void* data;
  int64_t group_stride;
  int64_t set_stride;
};

struct BatchNormForward {
  StatGroups stat_groups;
  const void* x;
  PerStatGroup weight;  // null: y is not wanted
  PerStatGroup bias;
  const void* shortcut;  // acc [1], the share of x that is added; null: none
  int64_t correction;    // of the variance: divided by n - correction
  bool estimated;        // move the running statistics first, then normalise by them
  double momentum;       // share of the new value; negative: an average over all updates
  // what stands under the root: max(variance, floor) + eps + eps_total / n
  double eps;
  double floor;
  double eps_total;
  // state, moved in place; all null: none
  void* running_mean;            // acc [channels]
  void* running_var;             // acc [channels]
  int64_t* num_batches_tracked;  // [1]
  // results
  void* y;         // like x
  void* stats;     // acc [3, groups, sets, channels]: mean, variance, 1/sqrt(what stands under the root)
  int64_t* count;  // [groups, sets]: numbers that a statistics group has
};

struct BatchNormBackward {
  StatGroups stat_groups;
  const void* grad_y;
  const void* grad_mean;  // acc [groups, sets, channels], of the statistics; null: none
  const void* grad_var;
  const void* x;
  PerStatGroup weight;
  const void* shortcut;
  const void* stats;     // from the forward
  const int64_t* count;  // from the forward
  int64_t correction;
  bool estimated;  // nothing comes through the statistics
  double floor;    // nothing comes through a variance below it
  // results
  void* grad_x;       // like x
  void* grad_weight;  // acc [groups, sets, channels]
  void* grad_bias;    // acc [groups, sets, channels]
};

// Of the statistics groups one group without regions.
struct MovingAverageForward {
  StatGroups stat_groups;
  const void* x;
  const void* weight;  // acc [channels]
  const void* bias;    // acc [channels]
  int64_t window;
  int64_t warmup_iters;
  double eps;
  double momentum;
  // state, moved in place
  void* running_var;  // acc [channels]
  void* buffer_x2;    // acc [window, channels]
  int64_t* iters;     // [1]
  // results
  void* y;        // like x
  void* stats;    // acc [2, channels]: 1/sqrt(variance + eps), r
  int64_t* step;  // [1]: t, or 0 where nothing is valid
};

struct MovingAverageBackward {
  StatGroups stat_groups;
  const void* grad_y;
  const void* x;
  const void* weight;   // acc [channels]
  const void* stats;    // from the forward
  const int64_t* step;  // from the forward
  int64_t window;
  int64_t warmup_iters;
  void* buffer_gz;  // acc [window, channels], moved in place
  // results
  void* grad_x;       // like x
  void* grad_weight;  // acc [channels]
  void* grad_bias;    // acc [channels]
};

// Every operation's kernel is found by its arguments.
//
// On the host. The caller brings the threads: parallel(tasks, grain, body) calls body(begin, end) on ranges that
// cover [0, tasks) once; with no more tasks than grain, once and in the calling thread. Results do not depend on how the
// tasks are split.
using TaskRange = std::function<void(int64_t begin, int64_t end)>;
using Parallel = void (*)(int64_t tasks, int64_t grain, const TaskRange& body);

void run_cpu(const UnifiedForward& args, Parallel parallel);
void run_cpu(const UnifiedBackward& args, Parallel parallel);
void run_cpu(const PowerForward& args, Parallel parallel);
void run_cpu(const PowerBackward& args, Parallel parallel);
void run_cpu(const RowNormForward& args, Parallel parallel);
void run_cpu(const RowNormBackward& args, Parallel parallel);
void run_cpu(const DynamicActivationForward& args, Parallel parallel);
void run_cpu(const DynamicActivationBackward& args, Parallel parallel);
void run_cpu(const BatchNormForward& args, Parallel parallel);
void run_cpu(const BatchNormBackward& args, Parallel parallel);
void run_cpu(const MovingAverageForward& args, Parallel parallel);
void run_cpu(const MovingAverageBackward& args, Parallel parallel);

// Asks for huge pages under a fresh result before its first write. Does nothing where there are none.
void prefer_huge_pages(void* data, size_t bytes);

// On the device: asynchronous on the stream, no value comes to the host, so a CUDA graph can capture the
// launches. The workspace is uninitialised device memory of at least cuda_workspace_bytes. Returns a cudaError_t.
size_t cuda_workspace_bytes(const Matrix& shape, int64_t group_num);

int run_cuda(const UnifiedForward& args, void* workspace, void* stream);
int run_cuda(const UnifiedBackward& args, void* workspace, void* stream);
int run_cuda(const PowerForward& args, void* workspace, void* stream);
int run_cuda(const PowerBackward& args, void* workspace, void* stream);
int run_cuda(const RowNormForward& args, void* workspace, void* stream);
int run_cuda(const RowNormBackward& args, void* workspace, void* stream);
int run_cuda(const DynamicActivationForward& args, void* workspace, void* stream);
int run_cuda(const DynamicActivationBackward& args, void* workspace, void* stream);

size_t cuda_workspace_bytes(const StatGroups& stat_groups);

int run_cuda(const BatchNormForward& args, void* workspace, void* stream);
int run_cuda(const BatchNormBackward& args, void* workspace, void* stream);
int run_cuda(const MovingAverageForward& args, void* workspace, void* stream);
int run_cuda(const MovingAverageBackward& args, void* workspace, void* stream);

}  // namespace normfuse
