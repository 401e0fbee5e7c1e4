// Barriers in shared memory (mbarrier), copies of boxes of tensors (TMA) and products of a
// warpgroup (wgmma), which end as late as the waits allow.
//
// A copy destroys what it will overwrite when it is asked for, and brings the new bytes when a
// thread has waited for its barrier's phase. A product destroys the sums in the registers when it
// is asked for, and reads its operands and adds when its group is waited for. So whoever is early,
// or overwrites what is still needed, computes nonsense; the checking runtime says so.
//
// Layouts are those of the PTX manual: "Tensors", "Asynchronous Warpgroup Level Matrix Shared
// Memory Layout". The bytes of a tensor map are the stand-in's own (tests/cuda_on_cpu/driver.py).

#include "runtime.h"

#include <stdio.h>
#include <string.h>

#include <map>

namespace {

// ----------------------------------------------------------------------------------- the maps

const unsigned MAGIC = 0x50414d54;
enum { BITS_16, TF32 };

struct Map {
  unsigned magic;
  unsigned char type, axes, im2col, swizzle;
  unsigned long long address;
  unsigned long long strides[4];  // bytes
  unsigned last[5];               // the largest index of each axis
  unsigned short box[5];          // of im2col: channels and pixels
  short lower[3], upper[3];       // of im2col, from W on
  unsigned char steps[5];
};
static_assert(sizeof(Map) <= 128, "a tensor map has 128 bytes");

int bytes_of(const Map& m) { return m.type == TF32 ? 4 : 2; }

// TMA's swizzle of 128 bytes, and that of operands.
unsigned swizzled(unsigned address) { return address ^ (address >> 3 & 0x70); }

[[noreturn]] void fail(const char* what, void* caller) {
  char who[128];
  cuda_on_cpu_fail("%s: %s [code %x]", where(thread_now.block, thread_now.thread, who, sizeof who),
                   what, checks_code(caller));
}

// -------------------------------------------------------------------------------- the barriers

struct Copy {
  unsigned to;  // an offset in shared memory
  int bytes;
  Map map;
  int at[5], tap[3];
  void* caller;
};

struct Barrier {
  unsigned arrivals, pending, phase, initialiser;
  long expected, coming;  // bytes of this phase
  std::vector<Copy> copies;
  std::vector<unsigned> waiting;
  bool known;  // to copies: fenced since it was initialised
  Clock clock;
};

std::map<uintptr_t, Barrier> barriers;

char* shared(unsigned offset) { return (char*)cuda_on_cpu_dynamic_shared() + offset; }

Barrier& barrier_at(const void* address, void* caller) {
  const auto found = barriers.find((uintptr_t)address);
  if (found == barriers.end()) fail("uses an mbarrier that is not initialised", caller);
  return found->second;
}

void wake_all(Barrier& barrier) {
  for (unsigned thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

void bring(const Copy& copy);

// Ends the phase if all have arrived and all bytes have been asked for: these land now.
bool complete(Barrier& barrier) {
  if (barrier.pending || barrier.expected != barrier.coming) return false;
  for (const Copy& copy : barrier.copies) bring(copy);
  if (!barrier.copies.empty()) checks_release(barrier.clock);
  barrier.copies.clear();
  barrier.expected = barrier.coming = 0;
  barrier.pending = barrier.arrivals;
  barrier.phase++;
  wake_all(barrier);
  return true;
}

// ---------------------------------------------------------------------------------- the copies

// Calls act(offset in shared memory, source or nullptr for zeros) for each 16 bytes of a copy.
template <class F> void each_chunk(const Copy& copy, F act) {
  const Map& m = copy.map;
  const int size = bytes_of(m), inner = m.box[0] * size, spatial = m.axes - 2;
  int at[5] = {};
  for (int i = 0; i < m.axes; i++) at[i] = copy.at[i];
  unsigned rows = 1;
  if (m.im2col) rows = m.box[1];
  else
    for (int i = 1; i < m.axes; i++) rows *= (m.box[i] + m.steps[i] - 1) / m.steps[i];
  for (unsigned row = 0; row < rows; row++) {
    long long from = 0;
    bool inside = true;
    unsigned rest = row;
    for (int i = 1; i < m.axes; i++) {
      long long index = at[i];
      if (m.im2col && i <= spatial) index += copy.tap[i - 1];
      if (!m.im2col) {
        const unsigned count = (m.box[i] + m.steps[i] - 1) / m.steps[i];
        index += rest % count * m.steps[i];
        rest /= count;
      }
      inside = inside && index >= 0 && index <= (long long)m.last[i];
      from += index * (long long)m.strides[i - 1];
    }
    for (int byte = 0; byte < inner; byte += 16) {
      // 16 bytes may hang over the end of the innermost axis: its values are looked at one by one.
      const long long index = at[0] + byte / size;
      const bool some = inside && index <= (long long)m.last[0] && index >= 0;
      const int values = !some ? 0
                         : (long long)m.last[0] - index + 1 < 16 / size
                             ? (int)((long long)m.last[0] - index + 1)
                             : 16 / size;
      act(swizzled(copy.to + row * inner + byte),
          some ? (const char*)m.address + from + index * size : nullptr, values * size);
    }
    if (m.im2col)  // on to the next pixel
      for (int i = 1; i < m.axes; i++) {
        if (i == m.axes - 1) {
          at[i]++;
          break;
        }
        at[i] += m.steps[i];
        if (at[i] <= (int)m.last[i] + m.upper[i - 1]) break;
        at[i] = m.lower[i - 1];
      }
  }
}

void bring(const Copy& copy) {
  each_chunk(copy, [&](unsigned to, const char* from, int bytes) {
    char* const place = shared(to);
    checks_async_lands(place, from, 16, bytes, copy.caller);
    memset(place, 0, 16);
    if (from) memcpy(place, from, bytes);
    if (copy.map.type == TF32)
      for (int i = 0; i < 4; i++) {
        unsigned bits;
        memcpy(&bits, place + 4 * i, 4);
        if ((bits & 0x7fffffffu) > 0x7f800000u) bits = 0x7fffffffu;
        else if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & ~0x1fffu;
        memcpy(place + 4 * i, &bits, 4);
      }
  });
}

// -------------------------------------------------------------------------------- the products

enum { WGMMA_F16, WGMMA_BF16, WGMMA_TF32 };  // as in hopper.h

// What a warp's registers will hold.
struct Sums {
  float* lanes[32];
  int columns, pending;
  std::vector<float> values;  // 16 x columns
};

struct Product {
  cuda_on_cpu_product what;
  float* sums;  // lane 0's
  unsigned group, quarter;
};

struct Warp {
  std::vector<Product> products;
  std::map<float*, Sums> sums;
  unsigned groups;
  bool fenced;
};

std::vector<Warp> warps;

float half_value(unsigned short bits) {
  static std::vector<float> table;
  if (table.empty())
    for (unsigned i = 0; i < 65536; i++) {
      const unsigned exponent = i >> 10 & 31, mantissa = i & 1023;
      float value = exponent ? (float)(mantissa | 1024) : (float)mantissa;
      for (int e = exponent ? (int)exponent : 1; e < 25; e++) value *= 0.5f;
      for (int e = 25; e < (int)exponent; e++) value *= 2;
      if (exponent == 31) value = mantissa ? __builtin_nanf("") : __builtin_inff();
      table.push_back(i >> 15 ? -value : value);
    }
  return table[bits];
}

// The first of 16 bytes of an operand: `row` along M or N, `chunk` of 16 bytes along K; across: 16
// bytes along M or N from 8 * row on, at position `chunk` of K.
unsigned place(unsigned long long descriptor, bool across, int row, int chunk) {
  const unsigned start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const unsigned stride = (descriptor >> 32 & 0x3fff) << 4;
  return across ? swizzled(start + row / 8 * leading + row % 8 * 16 + chunk / 8 * stride +
                           chunk % 8 * 128)
                : swizzled(start + row / 8 * stride + row % 8 * 128 + chunk * 16);
}

// Calls act(offset in shared memory) for each 16 bytes that the product of this warp reads.
template <class F> void each_operand(const Product& p, F act) {
  for (int which = 0; which < 2; which++) {
    const bool across = which ? p.what.b_across : p.what.a_across;
    const unsigned long long descriptor = which ? p.what.b : p.what.a;
    const int first = which ? 0 : 16 * p.quarter, count = which ? 2 * p.what.count : 16;
    if (across)
      for (int row = first / 8; row < (first + count) / 8; row++)
        for (int k = 0; k < 16; k++) act(place(descriptor, true, row, k));
    else
      for (int row = first; row < first + count; row++)
        for (int chunk = 0; chunk < 2; chunk++) act(place(descriptor, false, row, chunk));
  }
}

// Value number k of row `row` of an operand.
float element(const Product& p, bool of_b, int row, int k) {
  const bool across = of_b ? p.what.b_across : p.what.a_across;
  const unsigned long long descriptor = of_b ? p.what.b : p.what.a;
  if (p.what.kind == WGMMA_TF32) {
    unsigned bits;
    memcpy(&bits, shared(place(descriptor, false, row, k / 4)) + k % 4 * 4, 4);
    bits &= ~0x1fffu;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }
  unsigned short bits;
  if (across) memcpy(&bits, shared(place(descriptor, true, row / 8, k)) + row % 8 * 2, 2);
  else memcpy(&bits, shared(place(descriptor, false, row, k / 8)) + k % 8 * 2, 2);
  if (p.what.kind == WGMMA_F16) return half_value(bits);
  const unsigned wide = (unsigned)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

void multiply(const Product& p, Sums& sums) {
  typedef float Vector __attribute__((vector_size(32)));
  const int depth = p.what.kind == WGMMA_TF32 ? 8 : 16, n = sums.columns;
  std::vector<Vector> b(n / 8);
  Vector* const c = (Vector*)__builtin_alloca_with_align(16 * n * sizeof(float), 256);
  memcpy(c, sums.values.data(), 16 * n * sizeof(float));
  for (int k = 0; k < depth; k++) {
    for (int j = 0; j < n; j++) b[j / 8][j % 8] = element(p, true, j, k);
    for (int row = 0; row < 16; row++) {
      const float a = element(p, false, 16 * p.quarter + row, k);
      for (int j = 0; j < n / 8; j++) c[row * (n / 8) + j] += a * b[j];
    }
  }
  memcpy(sums.values.data(), c, 16 * n * sizeof(float));
}

// Between the lanes' registers and a matrix.
template <class F> void each_sum(Sums& sums, F act) {
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < sums.columns / 2; i++) {
      const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      act(sums.lanes[lane][i], sums.values[row * sums.columns + column]);
    }
}

Warp& warp_now() { return warps[thread_now.thread / 32]; }

void start(const cuda_on_cpu_bits* all) {
  const auto lane = [&](int i) { return (const cuda_on_cpu_product*)all[i]; };
  const cuda_on_cpu_product what = *lane(0);
  for (int i = 1; i < 32; i++)
    if (lane(i)->a != what.a || lane(i)->b != what.b || lane(i)->count != what.count ||
        lane(i)->kind != what.kind)
      fail("asks for a wgmma whose descriptors differ from lane to lane", what.caller);
  for (unsigned long long d : {what.a, what.b}) {
    if (d >> 62 != 1) fail("a wgmma's operand is not swizzled by 128 bytes", what.caller);
    if (d >> 49 & 7) fail("a wgmma's operand does not start on a pattern of 1024 bytes", what.caller);
  }
  Warp& warp = warp_now();
  float* const key = what.d;
  if (!warp.sums.count(key)) {
    if (!warp.fenced) fail("asks for a wgmma without a wgmma.fence since its sums changed", what.caller);
    Sums& sums = warp.sums[key];
    sums.columns = 2 * what.count, sums.pending = 0;
    sums.values.resize(16 * sums.columns);
    for (int i = 0; i < 32; i++) sums.lanes[i] = lane(i)->d;
    each_sum(sums, [](float& in_register, float& value) { value = in_register; });
    for (int i = 0; i < 32; i++) memset(sums.lanes[i], 0xff, what.count * sizeof(float));
  }
  warp.sums[key].pending++;
  warp.products.push_back({what, key, warp.groups, thread_now.thread / 32 % 4});
  each_operand(warp.products.back(), [&](unsigned from) {
    if (from + 16 > cuda_on_cpu_dynamic_shared_size())
      fail("a wgmma's operand goes past the end of shared memory", what.caller);
    checks_product_starts(shared(from), 16, what.caller);
  });
}

void finish(Warp& warp, unsigned groups) {
  size_t done = 0;
  while (done < warp.products.size() && warp.products[done].group < groups) {
    const Product& p = warp.products[done++];
    Sums& sums = warp.sums[p.sums];
    each_operand(p, [&](unsigned from) { checks_product_ends(shared(from), 16, p.what.caller); });
    multiply(p, sums);
    if (--sums.pending) continue;
    each_sum(sums, [](float& in_register, float& value) { in_register = value; });
    warp.sums.erase(p.sums);
    warp.fenced = false;
  }
  warp.products.erase(warp.products.begin(), warp.products.begin() + (long)done);
  if (done) checks_join_warp();
}

}  // namespace

void hopper_begin(unsigned threads) {
  barriers.clear();
  warps.assign((threads + 31) / 32, {});
}

void hopper_end(unsigned thread) {
  if (warps[thread / 32].products.empty()) return;
  fail("returns with products of wgmma that it has not waited for",
       warps[thread / 32].products[0].what.caller);
}

void hopper_block_ends() {
  for (auto& [address, barrier] : barriers)
    if (!barrier.copies.empty())
      fail("the block ends with copies of a tensor on their way", barrier.copies[0].caller);
}

bool hopper_describe(char* text, size_t room) {
  for (auto& [address, b] : barriers)
    if (!b.waiting.empty()) {
      snprintf(text, room,
               "the mbarrier at byte %zu of shared memory misses %u of %u arrivals in phase %u, "
               "and of %ld bytes announced %ld are on their way",
               (size_t)(address - (uintptr_t)cuda_on_cpu_dynamic_shared()), b.pending, b.arrivals,
               b.phase, b.expected, b.coming);
      return true;
    }
  return false;
}

extern "C" {

unsigned cuda_on_cpu_shared_address(const void* p) {
  const uintptr_t offset = (uintptr_t)p - (uintptr_t)cuda_on_cpu_dynamic_shared();
  if (offset > cuda_on_cpu_dynamic_shared_size())
    cuda_on_cpu_fail("the address in shared memory is asked for of what is not in dynamic shared "
                     "memory");
  return (unsigned)offset;
}

void cuda_on_cpu_proxy_fence() {
  for (auto& [address, barrier] : barriers)
    if (barrier.initialiser == thread_now.thread) barrier.known = true;
  checks_proxy_fence();
}

void cuda_on_cpu_mbarrier_init(void* at, int arrivals, void* caller) {
  if ((uintptr_t)at % 8) fail("initialises an mbarrier off a multiple of 8 bytes", caller);
  if (arrivals < 1) fail("initialises an mbarrier for less than one arrival", caller);
  checks_mbarrier(at, true, caller);
  Barrier barrier = {};
  barrier.arrivals = barrier.pending = (unsigned)arrivals;
  barrier.initialiser = thread_now.thread;
  barriers[(uintptr_t)at] = barrier;
}

void cuda_on_cpu_mbarrier_arrive(void* at, int bytes, void* caller) {
  checks_mbarrier(at, false, caller);
  Barrier& barrier = barrier_at(at, caller);
  if (barrier.pending == 0 && !complete(barrier))
    fail("arrives at an mbarrier whose phase misses bytes, and no arrivals", caller);
  checks_release(barrier.clock);
  barrier.expected += bytes;
  barrier.pending--;
  if (barrier.copies.empty() && barrier.coming == 0) complete(barrier);
  wake_all(barrier);
}

void cuda_on_cpu_mbarrier_wait(void* at, int parity, void* caller) {
  checks_mbarrier(at, false, caller);
  for (;;) {
    Barrier& barrier = barrier_at(at, caller);
    if ((int)(barrier.phase & 1) != parity || complete(barrier)) {
      checks_acquire(barrier.clock);
      return;
    }
    barrier.waiting.push_back(thread_now.thread);
    park();
  }
}

void cuda_on_cpu_tensor_copy(void* to, const void* map, void* at, int axes, const int* start,
                             const int* tap, void* caller) {
  Copy copy = {};
  memcpy(&copy.map, map, sizeof copy.map);
  const Map& m = copy.map;
  if (m.magic != MAGIC) fail("copies by what is not a tensor map", caller);
  if (m.axes != axes || m.im2col != (tap != nullptr))
    fail("copies by a tensor map of another number of axes, or of another mode", caller);
  copy.to = cuda_on_cpu_shared_address(to);
  copy.caller = caller;
  if (copy.to % (m.swizzle ? 1024 : 128))
    fail("copies to an address that is no multiple of the swizzle's 1024 bytes", caller);
  for (int i = 0; i < axes; i++) copy.at[i] = start[i];
  for (int i = 0; tap && i < axes - 2; i++) {
    const int most = axes == 3 ? 65535 : axes == 4 ? 255 : 31;
    copy.tap[i] = tap[i];
    if (tap[i] < 0 || tap[i] > most) fail("copies with an im2col offset out of range", caller);
    if (start[i + 1] < m.lower[i] || start[i + 1] > (int)m.last[i + 1] + m.upper[i])
      fail("copies from a pixel outside of the map's box", caller);
  }
  checks_mbarrier(at, false, caller);
  Barrier& barrier = barrier_at(at, caller);
  if (!barrier.known)
    fail("copies to an mbarrier that is not fenced since it was initialised", caller);
  each_chunk(copy, [&](unsigned place, const char* from, int bytes) {
    if (place + 16 > cuda_on_cpu_dynamic_shared_size())
      fail("copies a tensor past the end of shared memory", caller);
    checks_async_starts(shared(place), from, 16, bytes, caller);
    memset(shared(place), 0xff, 16);
    barrier.coming += 16;
  });
  barrier.copies.push_back(copy);
  if (barrier.pending == 0 && barrier.coming > barrier.expected)
    fail("copies more bytes than its mbarrier was told to expect", caller);
  wake_all(barrier);
}

void cuda_on_cpu_wgmma_fence() {
  cuda_on_cpu_bits all[32];
  cuda_on_cpu_whole_warp(GATHER_WGMMA + 1, 0, all,
                         [](const cuda_on_cpu_bits*) { warp_now().fenced = true; });
}

void cuda_on_cpu_wgmma_commit() {
  cuda_on_cpu_bits all[32];
  cuda_on_cpu_whole_warp(GATHER_WGMMA + 2, 0, all,
                         [](const cuda_on_cpu_bits*) { warp_now().groups++; });
}

void cuda_on_cpu_wgmma_wait(int most) {
  cuda_on_cpu_bits all[32];
  cuda_on_cpu_whole_warp(GATHER_WGMMA + 3, (cuda_on_cpu_bits)most, all,
                         [](const cuda_on_cpu_bits* values) {
                           Warp& warp = warp_now();
                           const unsigned keep = (unsigned)values[0];
                           if (warp.groups > keep) finish(warp, warp.groups - keep);
                         });
}

void cuda_on_cpu_wgmma(const cuda_on_cpu_product* mine) {
  cuda_on_cpu_bits all[32];
  cuda_on_cpu_whole_warp(GATHER_WGMMA, (cuda_on_cpu_bits)mine, all, start);
}
}
