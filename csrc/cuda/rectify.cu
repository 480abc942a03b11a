#include "cuda/rectify.h"

#include <algorithm>
#include <bit>

#include "cuda/rectify.cuh"

namespace layer_collapse {
namespace {

// Enough blocks for every multiprocessor of the largest card to hold several, and work enough per
// thread that the sums at a block's end do not show.
constexpr int64_t kBlocks = 1024;
constexpr int64_t kVectorsPerThread = 16;
// Channel-fastest: fewer and longer blocks, as each ends with an atomic per channel and counter.
constexpr int64_t kChannelBlocks = 512, kMinRows = 4, kRowsPerThread = 128;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int lanes_for(int64_t vectors, int most) {
  return static_cast<int>(
      std::bit_ceil(static_cast<uint64_t>(std::clamp<int64_t>(vectors, 1, most))));
}

template <typename Rectifier, typename T>
int run_planes(RectifyArguments<T> arguments, int threads, void* stream) {
  const int64_t vectors = ceil_div(arguments.inner, kVectorValues<T>);
  arguments.lanes = lanes_for(vectors, threads);
  arguments.segment = threads * kVectorsPerThread * kVectorValues<T>;
  arguments.segments = ceil_div(arguments.inner, arguments.segment);
  const int64_t units = arguments.outer * arguments.segments;
  const int64_t at_once = threads / arguments.lanes;
  const int64_t per_unit =
      ceil_div(std::min(vectors, threads * kVectorsPerThread), arguments.lanes);
  const int64_t most = ceil_div(units, at_once);
  const int64_t visits = std::clamp<int64_t>(most * arguments.channels / kBlocks, 1,
                                             std::max<int64_t>(1, kVectorsPerThread / per_unit));
  arguments.slices = static_cast<unsigned>(ceil_div(most, visits));
  return launch(rectify_planes<Rectifier, T>, arguments.slices * arguments.channels, threads,
                stream, arguments);
}

template <typename Rectifier, typename T, int kValues>
int run_channels(RectifyArguments<T> arguments, int threads, void* stream) {
  const int64_t columns = arguments.channels / kValues;
  arguments.lanes = lanes_for(columns, kWarp);
  const int64_t tiles = ceil_div(columns, arguments.lanes);
  const int64_t at_once = threads / arguments.lanes;
  const int64_t visits = std::clamp<int64_t>(
      ceil_div(arguments.outer, at_once) * tiles / kChannelBlocks, kMinRows, kRowsPerThread);
  arguments.slices = static_cast<unsigned>(ceil_div(arguments.outer, at_once * visits));
  arguments.share = static_cast<int>(ceil_div(arguments.outer, arguments.slices));
  arguments.step = static_cast<int>(at_once);
  arguments.stride = at_once * arguments.channels;
  return launch(rectify_channels<Rectifier, T, kValues>, arguments.slices * tiles, threads, stream,
                arguments);
}

template <typename T>
bool is_aligned(const RectifyArguments<T>& arguments) {
  const auto places =
      reinterpret_cast<uintptr_t>(arguments.x) | reinterpret_cast<uintptr_t>(arguments.y);
  return places % sizeof(uint4) == 0 && arguments.channels % kVectorValues<T> == 0;
}

template <typename Rectifier, typename T>
int run(const RectifyArguments<T>& arguments, int threads, void* stream) {
  if (arguments.inner > 1) return run_planes<Rectifier>(arguments, threads, stream);
  return is_aligned(arguments)
             ? run_channels<Rectifier, T, kVectorValues<T>>(arguments, threads, stream)
             : run_channels<Rectifier, T, 1>(arguments, threads, stream);
}

template <typename T>
int run_kind(const RectifyLaunch& call, void* stream) {
  const RectifyArguments<T> arguments{static_cast<const T*>(call.x),
                                      static_cast<T*>(call.y),
                                      call.ledger,
                                      call.valid,
                                      static_cast<const T*>(call.slopes),
                                      call.slope,
                                      call.outer,
                                      call.channels,
                                      call.inner,
                                      call.kind,
                                      0,
                                      0,
                                      0,
                                      0,
                                      0,
                                      0,
                                      0};
  switch (call.kind) {
    case Kind::relu:
      return run<DeviceRelu>(arguments, call.threads, stream);
    case Kind::relu6:
      return run<DeviceRelu6>(arguments, call.threads, stream);
    case Kind::leaky_relu:
    case Kind::prelu:
      return run<DeviceLeakyRelu>(arguments, call.threads, stream);
    case Kind::hardswish:
      return run<DeviceHardswish>(arguments, call.threads, stream);
    default:
      return call.ledger ? run<DeviceCountOnly>(arguments, call.threads, stream) : 0;
  }
}

}  // namespace

int launch_rectify(const RectifyLaunch& call, void* stream) {
  const int64_t positions = call.outer * call.inner;
  if (positions == 0) return 0;
  if (call.channels == 0) {
    if (!call.ledger) return 0;
    return launch(count_positions, 1, call.threads, stream, call.ledger, call.valid, positions);
  }
  switch (call.dtype) {
    case Dtype::float32:
      return run_kind<float>(call, stream);
    case Dtype::float64:
      return run_kind<double>(call, stream);
    case Dtype::bfloat16:
      return run_kind<BFloat16>(call, stream);
    default:
      return run_kind<Half>(call, stream);
  }
}

}  // namespace layer_collapse
