// The transpose of the loop's tangent. Each step, from the last to the first, with g the cotangent of the state s_t:
//   (du, dv, dtheta, g) <- gates_vjp(g + dafter_t),   g.h += mask * (dv W_hh^T),   at a reset: drestart += g, g <- 0
// and for a whole chunk of steps at once:
//   dx = du W_ih^T,   dW_ih = sum_t x_t^T du_t,   dW_hh = sum_t (mask * h_{t-1})^T dv_t,   db = sum_t du_t

#pragma once

#include "forward.h"

namespace {

struct Backward {
  const float *x, *w_ih, *w_hh;  // as in Forward
  const uint8_t *valid, *resets;
  const float* mask;
  Inputs theta, state, restart, after, dlast, dafter;  // dafter: null for a state that is not an output
  const float* parts;
  long parts_row;
  long kept_rows;  // the number of sequences in parts and after
  float *dx, *dw_ih, *db, *dw_hh;  // dx may be null
  Outputs dtheta, dstate, drestart;
  bool more = false;  // whether results other than dx and dstate are added to the values in place
};

// out (M, UB) += A B for the gradient of weights. The last block of units may be short.
void accumulate(const Run& run, long M, long K, const float* A, const float* B, long ub, bool fresh, float* out) {
  const long n = std::min<long>(UB, run.H - ub * UB);
  // Prefetches the tile below, which is the next one: its rows are pages apart.
  if (!fresh)
    for (long r = M; r < 2 * M; ++r)
      for (long j = 0; j < UB; j += 16) __builtin_prefetch(out + r * run.width + j, 1, 2);
  if (n == UB) return multiply_strip(M, K, A, B, fresh ? nullptr : out, run.width, out, run.width);
  float tile[MR * UB];
  multiply_strip(M, K, A, B, nullptr, 0, tile, UB);
  for (long r = 0; r < M; ++r)
    for (long j = 0; j < n; ++j) out[r * run.width + j] = tile[r * UB + j] + (fresh ? 0 : out[r * run.width + j]);
}

Weights backward_weights(const Run& run, bool by_inputs) {
  const size_t K = run.blocks * run.G * UB, f_blocks = (run.depth + UB - 1) / UB;
  const size_t hh = run.coupled ? run.blocks * K * UB : 0;
  return Weights(by_inputs ? f_blocks * K * UB : 0, hh, 0, run.cell.thetas * run.blocks * UB);
}

void backward_steps(Run run, const Backward& f, Weights& weights) {
  run.plan(processors());
  Crew crew(run.threads());
  if (crew.size() < run.threads()) run.plan(crew.size());
  const Cell& cell = run.cell;
  const long T = run.T, N = run.N, F = run.F, H = run.H, G = run.G, blocks = run.blocks, threads = run.threads();
  const long depth = run.depth, S = cell.states, thetas = cell.thetas, h_state = cell.hidden_state;
  const bool apart = run.apart, coupled = run.coupled;
  const long K = blocks * G * UB, row = padded(K), hidden = blocks * UB;
  // Many rows, so that the gradients of weights, which lie in far memory, are updated rarely.
  const long chunk = std::max(1L, std::min(T, 320 / N)), most = chunk * N;
  const long f_blocks = (depth + UB - 1) / UB, f_strips = (depth + MR - 1) / MR;
  const long h_strips = coupled ? (H + MR - 1) / MR : 0;
  const size_t sizes[] = {size_t(most * row), apart ? size_t(most * row) : 0, size_t(S * N * hidden),
                          size_t(threads * thetas * hidden), size_t(most * f_strips * MR),
                          size_t(most * h_strips * MR), size_t(threads * most * UB), f.mask ? size_t(N * hidden) : 0};
  size_t total = 0;
  for (size_t size : sizes) total += Scratch::rounded(size);
  Scratch scratch(total);
  float *p_ih = weights.ih, *p_hh = weights.hh, *p_theta = weights.theta;
  float *du = scratch.take(sizes[0]), *dv = apart ? scratch.take(sizes[1]) : du, *carry = scratch.take(sizes[2]),
        *dtheta = scratch.take(sizes[3]), *strips_x = scratch.take(sizes[4]), *strips_h = scratch.take(sizes[5]),
        *panels = scratch.take(sizes[6]), *masked = scratch.take(sizes[7]);
  std::vector<Inputs> olds(threads, Inputs(S)), dafters(threads, Inputs(S));

  divide(run, crew, [&](const Part& part) {
    const long id = part.id, n0 = part.n0, n1 = part.n1;
    const auto [b0, b1] = ::share(blocks, part.units, part.unit);
    if (!weights.packed) {
      const auto [k0, k1] = part.share(blocks);
      for (long p = k0; p < k1 && coupled; ++p) pack_transposed(run, f.w_hh, H, p * UB, p_hh + p * K * UB);
      const auto [i0, i1] = part.share(f.dx ? f_blocks : 0);
      for (long p = i0; p < i1; ++p) pack_transposed(run, f.w_ih, F, p * UB, p_ih + p * K * UB);
      if (id == 0) pack_theta(run, f.theta, p_theta);
    }
    const Split split{blocks, part.units, n1 - n0};
    Inputs &old = olds[id], &dafter = dafters[id];
    Panels at;
    for (long ub = b0; ub < b1; ++ub) {
      at.from.push_back(f.mask ? -1 : ub * UB);
      at.to.push_back(ub * UB);
    }
    float* my_theta = dtheta + id * thetas * hidden;
    std::memset(my_theta, 0, 4 * thetas * hidden);
    for (long n = n0; n < n1; ++n)
      for (long s = 0; s < S; ++s)
        for (long unit = b0 * UB; unit < b1 * UB; unit += VL)
          store(carry + (s * N + n) * hidden + unit, load(f.dlast[s] + n * H + unit, H - unit));
    if (f.drestart[0] && !f.more)
      for (long s = 0; s < S; ++s)
        for (long n = n0; n < n1; ++n)
          for (long unit = b0 * UB; unit < std::min(H, b1 * UB); ++unit) f.drestart[s][n * H + unit] = 0;
    part.all.wait();

    for (long start = 0; start < T; start += chunk) {
      const long count = std::min(chunk, T - start), low = run.reverse ? start : T - start - count;
      for (long i = start; i < start + count; ++i) {
        const long t = run.time(T - 1 - i), before = run.time(T - 2 - i);
        const bool opens = i == T - 1;  // the first step of the loop, and the last one here
        const uint8_t* valid = f.valid ? f.valid + t * N : nullptr;
        const uint8_t* resets = f.resets ? f.resets + t * N : nullptr;
        for (long s = 0; s < S; ++s) {
          old[s] = opens ? f.state[s] : f.after[s] + before * f.kept_rows * H;
          dafter[s] = f.dafter[s] ? f.dafter[s] + t * N * H : nullptr;
        }
        const long place = ((t - low) * N + n0) * row;
        cell.backward({n0, n1, b0, b1, H, valid, resets, p_theta, my_theta, hidden,
                       f.parts + (t * f.kept_rows + n0) * f.parts_row + b0 * cell.parts * UB, f.parts_row, old.data(),
                       f.restart.data(), dafter.data(), carry, N * hidden, hidden, du + place + b0 * G * UB,
                       dv + place + b0 * G * UB, row});
        if (coupled) part.group.wait();
        float* dh = carry + (h_state * N + n0) * hidden;
        float* through = f.mask ? masked + n0 * hidden : dh;  // the cotangent through the product, before the mask
        if (!coupled) {
          // the units of this thread depend on no others
        } else if (n1 - n0 <= FEW) {
          narrow(n1 - n0, K, dv + place, row, p_hh + b0 * K * UB, at, b1 - b0, dh, hidden, through, hidden);
        } else {
          for (;;) {
            const auto [p0, p1] = part.steps.take(i + 1, split.pieces(), part.unit);
            if (p0 == p1) break;
            split.each(p0, p1, [&](long first, long end, long r0, long r1) {
              float* to = through + r0 * hidden + first * UB;
              multiply_long(r1 - r0, K, dv + place + r0 * row, row, p_hh + first * K * UB, end - first,
                            f.mask ? nullptr : to, hidden, to, hidden);
            });
          }
          // Other threads may have computed a part of these units, which is read below and in the next step.
          part.group.wait();
        }
        for (long n = n0; n < n1 && f.mask && coupled; ++n)
          for (long unit = b0 * UB; unit < std::min(H, b1 * UB); ++unit)
            carry[(h_state * N + n) * hidden + unit] += masked[n * hidden + unit] * f.mask[n * H + unit];
        if (resets)
          for (long n = n0; n < n1; ++n)
            for (long s = 0; s < S && resets[n]; ++s)
              for (long unit = b0 * UB; unit < b1 * UB; ++unit) {
                float& d = carry[(s * N + n) * hidden + unit];
                if (unit < H) f.drestart[s][n * H + unit] += d;
                d = 0;
              }
      }

      // For the whole chunk at once: the gradients of weights, by columns, and of the inputs, by rows.
      const long rows = count * N;
      const bool fresh = start == 0 && !f.more;
      {
        const auto [s0, s1] = part.share(f_strips + h_strips);
        for (long s = s0; s < s1; ++s) {
          const bool recurrent = s >= f_strips;
          const long k = (recurrent ? s - f_strips : s) * MR, m = std::min<long>(MR, (recurrent ? H : depth) - k);
          float* to = (recurrent ? strips_h : strips_x) + k * most;
          if (!recurrent) gather(rows, m, f.x + low * N * F + k, F, nullptr, to);
          for (long t = low; t < low + count && recurrent; ++t) {
            const float* mask = f.mask ? f.mask + k : nullptr;
            const long before = run.reverse ? t + 1 : t - 1;
            const float* from = t == run.time(0) ? f.state[h_state] : f.after[h_state] + before * f.kept_rows * H;
            gather(N, m, from + k, H, mask, to + (t - low) * N * m);
            for (long n = 0; n < N && f.resets; ++n)
              if (f.resets[t * N + n])
                gather(1, m, f.restart[h_state] + n * H + k, H, mask ? mask + n * H : nullptr,
                       to + ((t - low) * N + n) * m);
          }
        }
      }
      part.all.wait();
      const long phase = start / chunk + 1;
      while (f.dx) {
        const auto [r0, r1] = part.rows.take(phase, rows, id, 8 * MR);
        if (r0 == r1) break;
        for (long r = r0; r < r1 && run.given; ++r)
          for (long p = 0; p < blocks * G; ++p)
            std::memcpy(input_part(run, f.dx, low * N + r, p), du + r * row + p * UB,
                        4 * std::min<long>(UB, H - p / G * UB));
        if (run.given) continue;
        const long whole = F / UB, short_by = F % UB;
        float* to = f.dx + low * N * F;
        multiply_long(r1 - r0, K, du + r0 * row, row, p_ih, whole, nullptr, 0, to + r0 * F, F);
        for (long r = r0; r < r1 && short_by; r += MR) {
          float tile[MR * UB];
          const long m = std::min<long>(MR, r1 - r);
          multiply(m, K, du + r * row, row, p_ih + whole * K * UB, nullptr, 0, tile, UB);
          for (long j = 0; j < m; ++j) std::memcpy(to + (r + j) * F + whole * UB, tile + j * UB, 4 * short_by);
        }
      }
      float* panel = panels + id * most * UB;
      for (;;) {
        const auto [p0, p1] = part.panels.take(phase, blocks * G, id);
        if (p0 == p1) break;
        for (long p = p0; p < p1; ++p) {
          const long ub = p / G, column = p % G * H + ub * UB;
          float sum[UB];
          gather_block(rows, du + p * UB, row, panel, sum);
          for (long j = 0; j < UB && ub * UB + j < H; ++j)
            f.db[column + j] = sum[j] + (fresh ? 0 : f.db[column + j]);
          for (long k = 0; k < depth; k += MR)
            accumulate(run, std::min<long>(MR, depth - k), rows, strips_x + k * most, panel, ub, fresh,
                       f.dw_ih + k * run.width + column);
          if (apart) gather_block(rows, dv + p * UB, row, panel, nullptr);
          for (long k = 0; k < H && coupled; k += MR)
            accumulate(run, std::min<long>(MR, H - k), rows, strips_h + k * most, panel, ub, fresh,
                       f.dw_hh + k * run.width + column);
        }
      }
      part.all.wait();
    }
    for (long s = 0; s < S; ++s)
      for (long n = n0; n < n1; ++n)
        for (long unit = b0 * UB; unit < b1 * UB; unit += VL)
          store(f.dstate[s] + n * H + unit, load(carry + (s * N + n) * hidden + unit), H - unit);
    part.all.wait();
    if (id == 0)
      for (long j = 0; j < thetas; ++j)
        for (long u = 0; u < H; ++u) {
          float sum = f.more ? f.dtheta[j][u] : 0;
          for (long i = 0; i < threads; ++i) sum += dtheta[(i * thetas + j) * hidden + u];
          f.dtheta[j][u] = sum;
        }
  });
  weights.packed = true;
}

}  // namespace
