// Transformers actuales: variantes de atención. Flash attention on a GPU, after FlashAttention-2 (Dao 2023) and in the
// paper's names; attention.flash_attention_by_hand is the same for one head.
//
// A block of threads keeps a tile of ROWS rows in shared memory while tiles of COLS rows pass by. What belongs to pairs
// of their rows, S, P and dS, is born and dies in the registers of the block's threads:
//
//     forward      Q_i stays, K_j and V_j pass:          O_i = softmax(Q_i Kᵀ · scale) V
//     backward_q   Q_i and dO_i stay, K_j and V_j pass:  dQ_i = Σ_j dS K_j
//     backward_kv  K_j and V_j stay, Q_i and dO_i pass:  dV_j = Σ_i Pᵀ dO_i,  dK_j = Σ_i dSᵀ Q_i
//
// Each backward kernel computes P again, so that every sum has one owner: no atomics, with which the paper sums dQ up,
// and the same bits every time.
//
// A mask comes as a plan (flash_plan.py): the tiles that pass by each tile that stays, those only of which some pair is
// seen, and where some pair is not, a bit for each pair. What would pass from behind the end of an array is not seen.
//
// The kernels, at the end, are written once, over two products of tiles, a bᵀ and p b. These exist twice: in float32
// on the ordinary cores, and, compiled with HALF, in float16 on the tensor cores with sums in float32. In both, a row
// of S belongs to LANES neighbouring lanes of one warp, and a thread holds C columns of R rows, `float S[R][C]`; of
// O_i W columns. In the float32 forward pass, with tiles of 128 by 32, LANES is 8, R 8, C 4. The softmax along a row
// takes a few shuffles and no other warp. Loops over r, c and w have constant bounds: the compiler unrolls them, and S
// lies in registers.
//
// Compile-time: DIM, the size of a head (32, 64 or 128), and HALF or not. Nothing is included, so NVRTC needs no path.
// Arrays are contiguous: Q, O, dO, dQ (batch, heads, queries, DIM), K, V, dK, dV (batch, kv_heads, keys, DIM), L and D
// (batch, heads, queries), which are float32 always.

#ifdef HALF
typedef unsigned short Number;                        // the bits of a float16
constexpr int LANES = 4, SCORE_RUN = 2, OUT_RUN = 2;  // as the tensor cores lay out their results
#else
typedef float Number;
constexpr int LANES = 8, SCORE_RUN = 1, OUT_RUN = 4;  // outputs are read and written four at once
#endif
constexpr int THREADS = 128, W = DIM / LANES;

// 16 bytes between the rows of a tile shift them against the banks, so that eight read at once meet no bank twice.
constexpr int STRIDE = DIM + 16 / sizeof(Number);

// Floats of shared memory before the tiles: in float32, what multiply_add needs
template <int ROWS, int COLS> constexpr int SCRATCH = LANES == 4 ? 0 : ROWS * (COLS + 8);

// S and L are in units of log 2, as exp2f is one instruction. An unseen pair has exp2f(UNSEEN - m) = 0 for every m, as
// m starts at LOWEST; no infinity is ever subtracted from another.
constexpr float LOG2_E = 1.44269504f, UNSEEN = -3e38f, LOWEST = -1e38f;

struct alignas(16) Quad { float at[4]; };  // the most that one instruction moves between memory and registers
extern __shared__ Quad shared[];
struct alignas(8) Tile { int number, bits; };  // one that passes, and the number of its bits, or -1: all is seen

// Where in a tile this thread's row r and column c lie: RUN neighbours are its own, the next RUN the next lane's.
__device__ int lane() { return threadIdx.x % 32; }
template <int R> __device__ int row_of(int r) { return 32 / LANES * (threadIdx.x / 32 * R + r) + lane() / LANES; }
template <int RUN> __device__ int column_of(int c) { return (c / RUN * LANES + lane() % LANES) * RUN + c % RUN; }

// Of the lanes that share a row
__device__ float row_sum(float x) {
    for (int step = 1; step < LANES; step *= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

__device__ float row_max(float x) {
    for (int step = 1; step < LANES; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// --- instructions that have no name in C; tests/engine/cuda_on_cpu.h says in C++ what they do ---

#ifndef ON_CPU
// Starts to copy from global to shared memory, past the registers. If not present: zeros, and nothing is read.
template <int BYTES> __device__ void copy_async(void* to, const void* from, bool present) {
    const unsigned target = __cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :: "r"(target), "l"(from), "n"(BYTES), "r"(present ? BYTES : 0) : "memory");
}

// This thread's; a __syncthreads() after it, for everybody's
__device__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ float to_float(float x) { return x; }
__device__ float to_float(unsigned short x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

// Two numbers as float16 in one register, the first in its lower half
__device__ unsigned pack(float first, float second) {
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

// Loads four 8 × 8 matrices of float16, to whose 32 rows the 32 lanes point. A lane receives two neighbours of each: in
// row lane / 4, columns 2 (lane % 4) and the next one, of the matrix or of its transpose.
template <bool TRANSPOSE> __device__ void load_matrices(unsigned (&x)[4], const void* row) {
    const unsigned from = __cvta_generic_to_shared(row);
    if (TRANSPOSE)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}

// [upper; lower] += a b for a (16, 16) and b (16, 8) in float16, the sums (8, 8) each in float32, on the tensor cores.
// All are spread over the warp's lanes as load_matrices spreads its matrices, b transposed.
__device__ void mma(float* upper, float* lower, const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(upper[0]), "+f"(upper[1]), "+f"(lower[0]), "+f"(lower[1])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// --- tiles, the mask and products ---

// Starts to load rows first, first + 1, … of an array of `total` rows; those behind its end become zeros. A thread's
// rows lie a constant apart, which costs no arithmetic.
template <int ROWS> __device__ void load_tile(Number* tile, const Number* from, int first, int total) {
    constexpr int PART = 16 / sizeof(Number), PARTS = DIM / PART;
    const int start = threadIdx.x / PARTS, column = threadIdx.x % PARTS * PART;
    tile += start * STRIDE + column;
    from += (first + start) * DIM + column;
    for (int row = 0; row < ROWS; row += THREADS / PARTS)
        copy_async<16>(tile + row * STRIDE, from + row * DIM, first + start + row < total);
}

template <int ROWS> __device__ void load_pair(Number* tiles, const Number* a, const Number* b, int first, int total) {
    load_tile<ROWS>(tiles, a, first, total);
    load_tile<ROWS>(tiles + ROWS * STRIDE, b, first, total);
}

// Writes x · scale, a (ROWS, DIM) tile in registers, to the rows from `first` on of an array of `total` rows.
template <int R> __device__ void store_tile(Number* to, const float (&x)[R][W], float scale, int first, int total) {
    for (int r = 0; r < R; r++) {
        const int row = first + row_of<R>(r);
        if (row >= total) continue;
        for (int w = 0; w < W; w += OUT_RUN) {
            Number* at = to + row * DIM + column_of<OUT_RUN>(w);
#ifdef HALF
            *(unsigned*)at = pack(x[r][w] * scale, x[r][w + 1] * scale);
#else
            *(Quad*)at = {x[r][w] * scale, x[r][w + 1] * scale, x[r][w + 2] * scale, x[r][w + 3] * scale};
#endif
        }
    }
}
// s · scale, in units of log 2, and UNSEEN where the tile's bits say so. A row of bits begins a word, with its lowest
// bit; of a thread's columns, 32 / LANES lie in the same word.
template <int R, int C> __device__ void scale_and_mask(float (&s)[R][C], float scale, const unsigned* bits, Tile tile) {
    constexpr int PER_WORD = 32 / LANES, WORDS = (C + PER_WORD - 1) / PER_WORD;
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) s[r][c] *= scale * LOG2_E;
    if (tile.bits < 0) return;
    bits += (long long)tile.bits * (R * THREADS / LANES) * WORDS;
    for (int r = 0; r < R; r++)
        for (int c = 0; c < C; c++) {
            const unsigned word = bits[row_of<R>(r) * WORDS + c / PER_WORD];
            if (!(word >> column_of<SCORE_RUN>(c) % 32 & 1)) s[r][c] = UNSEEN;
        }
}

// s += a bᵀ for tiles a (ROWS, DIM) and b (COLS, DIM); o += p b for p (ROWS, COLS), in registers, and b (COLS, DIM)

#ifdef HALF
// A 16 × 16 part of a tile, its quarters in the order of mma's a: the left ones, upper and lower, then the right ones
template <bool TRANSPOSE> __device__ void load_part(unsigned (&x)[4], const Number* corner) {
    load_matrices<TRANSPOSE>(x, corner + lane() % 16 * STRIDE + lane() / 16 * 8);
}

template <int R, int C> __device__ void multiply_transposed(float (&s)[R][C], const Number* a, const Number* b) {
    a += 32 / LANES * (threadIdx.x / 32 * R) * STRIDE;
    for (int d = 0; d < DIM; d += 16) {
        unsigned left[R / 2][4], right[4];
        for (int i = 0; i < R / 2; i++) load_part<false>(left[i], a + 16 * i * STRIDE + d);
        for (int j = 0; j < C; j += 4) {
            load_part<false>(right, b + 4 * j * STRIDE + d);
            for (int i = 0; i < R; i += 2) {
                mma(&s[i][j], &s[i + 1][j], left[i / 2], right[0], right[2]);
                mma(&s[i][j + 2], &s[i + 1][j + 2], left[i / 2], right[1], right[3]);
            }
        }
    }
}

// A result of mma, rounded to float16, lies as its operand a must: p need not leave its thread.
template <int R, int C> __device__ void multiply_add(float (&o)[R][W], const float (&p)[R][C], const Number* b) {
    for (int c = 0; c < C; c += 4) {
        unsigned left[R / 2][4], right[4];
        for (int i = 0; i < R; i++)
            for (int n = 0; n < 2; n++) left[i / 2][i % 2 + 2 * n] = pack(p[i][c + 2 * n], p[i][c + 2 * n + 1]);
        for (int j = 0; j < W; j += 4) {
            load_part<true>(right, b + 4 * c * STRIDE + 4 * j);
            for (int i = 0; i < R; i += 2) {
                mma(&o[i][j], &o[i + 1][j], left[i / 2], right[0], right[1]);
                mma(&o[i][j + 2], &o[i + 1][j + 2], left[i / 2], right[2], right[3]);
            }
        }
    }
}
#else
// In each step of 4 in d, R + C quads that a thread reads serve 4 R C multiplications.
template <int R, int C> __device__ void multiply_transposed(float (&s)[R][C], const Number* a, const Number* b) {
    a += row_of<R>(0) * STRIDE;
    b += column_of<SCORE_RUN>(0) * STRIDE;
#pragma unroll 4
    for (int d = 0; d < DIM; d += 4) {
        Quad right[C];
        for (int j = 0; j < C; j++) right[j] = *(const Quad*)(b + j * LANES * STRIDE + d);
        for (int i = 0; i < R; i++) {
            const Quad left = *(const Quad*)(a + 32 / LANES * i * STRIDE + d);
            for (int n = 0; n < 4; n++)
                for (int j = 0; j < C; j++) s[i][j] += left.at[n] * right[j].at[n];
        }
    }
}

// A thread needs its rows of p whole: each lane writes its share to shared memory and reads rows back, and as only its
// own warp is involved, __syncwarp is enough. 8 floats more per row put 4 rows written at once into different banks.
template <int R, int C> __device__ void multiply_add(float (&o)[R][W], const float (&p)[R][C], const Number* b) {
    constexpr int COLS = C * LANES, NEXT_ROW = 32 / LANES * (COLS + 8);
    float* left = (float*)shared + row_of<R>(0) * (COLS + 8);
    b += column_of<OUT_RUN>(0);
    for (int i = 0; i < R; i++)
        for (int j = 0; j < C; j++) left[i * NEXT_ROW + column_of<SCORE_RUN>(j)] = p[i][j];
    __syncwarp();
#pragma unroll 2
    for (int c = 0; c < COLS; c += 4) {
        Quad rows[R];
        for (int i = 0; i < R; i++) rows[i] = *(const Quad*)(left + i * NEXT_ROW + c);
        for (int n = 0; n < 4; n++)
            for (int j = 0; j < W; j += 4) {
                const Quad right = *(const Quad*)(b + (c + n) * STRIDE + j * LANES);
                for (int i = 0; i < R; i++)
                    for (int x = 0; x < 4; x++) o[i][j + x] += rows[i].at[n] * right.at[x];
            }
    }
    __syncwarp();
}
#endif

// --- the kernels: a block for each tile that stays (x), head (y) and row of the batch (z) ---
//
// Tile x meets tiles[n] for n from starts[z % plans * gridDim.x + x] up to the next start; each row of the batch has a
// plan, or all have the same. The 2 of the launch bounds allows 255 registers: left alone, the compiler goes for three
// blocks at once, and spills.

template <int ROWS, int COLS> __global__ void __launch_bounds__(THREADS, 2)
    forward(const Number* Q, const Number* K, const Number* V, const int* starts, const Tile* tiles,
            const unsigned* bits, int plans, int group, int queries, int keys, float scale, Number* O, float* L) {
    constexpr int R = ROWS * LANES / THREADS, C = COLS / LANES;
    const long long head = blockIdx.z * gridDim.y + blockIdx.y;  // counted through the batch
    Q += head * queries * DIM, O += head * queries * DIM, L += head * queries;
    K += head / group * keys * DIM, V += head / group * keys * DIM;

    const int i = gridDim.x - 1 - blockIdx.x;  // the last first: under a causal mask they take longest
    starts += blockIdx.z % plans * gridDim.x + i;
    const int first = starts[0], end = starts[1];

    Number* Q_i = (Number*)((float*)shared + SCRATCH<ROWS, COLS>);
    Number* passing = Q_i + ROWS * STRIDE;  // K_j and V_j twice: the tiles at work and those on their way
    constexpr int PASSING = 2 * COLS * STRIDE;
    load_tile<ROWS>(Q_i, Q, i * ROWS, queries);
    if (first < end) load_pair<COLS>(passing, K, V, tiles[first].number * COLS, keys);

    float m[R], l[R] = {}, O_i[R][W] = {};
    for (int r = 0; r < R; r++) m[r] = LOWEST;
    for (int n = first, turn = 0; n < end; n++, turn ^= 1) {
        wait_for_copies();
        __syncthreads();  // this tile has come, and everybody is done with the last, whose place the next one takes
        if (n + 1 < end) load_pair<COLS>(passing + (turn ^ 1) * PASSING, K, V, tiles[n + 1].number * COLS, keys);
        const Number *K_j = passing + turn * PASSING, *V_j = K_j + COLS * STRIDE;

        float P[R][C] = {};  // S = Q_i K_jᵀ · scale at first
        multiply_transposed(P, Q_i, K_j);
        scale_and_mask(P, scale, bits, tiles[n]);
        for (int r = 0; r < R; r++) {
            float larger = m[r];
            for (int c = 0; c < C; c++) larger = fmaxf(larger, P[r][c]);
            larger = row_max(larger);
            const float shrink = exp2f(m[r] - larger);
            l[r] *= shrink;  // of this lane's columns; the lanes are summed up at the end
            for (int w = 0; w < W; w++) O_i[r][w] *= shrink;
            for (int c = 0; c < C; c++) {
                P[r][c] = exp2f(P[r][c] - larger);
                l[r] += P[r][c];
            }
            m[r] = larger;
        }
        multiply_add(O_i, P, V_j);
    }

    for (int r = 0; r < R; r++) {
        l[r] = row_sum(l[r]);
        if (l[r] == 0) l[r] = 1;  // a query that sees no key keeps O = 0
        for (int w = 0; w < W; w++) O_i[r][w] /= l[r];
        const int row = i * ROWS + row_of<R>(r);
        if (row < queries && lane() % LANES == 0) L[row] = m[r] + log2f(l[r]);
    }
    store_tile(O, O_i, 1, i * ROWS, queries);
}

template <int ROWS, int COLS> __global__ void __launch_bounds__(THREADS, 2)
    backward_q(const Number* Q, const Number* K, const Number* V, const int* starts, const Tile* tiles,
               const unsigned* bits, int plans, int group, int queries, int keys, float scale, const Number* O,
               const Number* dO, const float* L, float* D, Number* dQ) {
    constexpr int R = ROWS * LANES / THREADS, C = COLS / LANES;
    const long long head = blockIdx.z * gridDim.y + blockIdx.y;
    Q += head * queries * DIM, O += head * queries * DIM, dO += head * queries * DIM, dQ += head * queries * DIM;
    K += head / group * keys * DIM, V += head / group * keys * DIM, L += head * queries, D += head * queries;

    const int i = gridDim.x - 1 - blockIdx.x;
    starts += blockIdx.z % plans * gridDim.x + i;
    const int first = starts[0], end = starts[1];

    Number* Q_i = (Number*)((float*)shared + SCRATCH<ROWS, COLS>);
    Number *dO_i = Q_i + ROWS * STRIDE, *passing = dO_i + ROWS * STRIDE;
    constexpr int PASSING = 2 * COLS * STRIDE;
    load_pair<ROWS>(Q_i, Q, dO, i * ROWS, queries);
    if (first < end) load_pair<COLS>(passing, K, V, tiles[first].number * COLS, keys);

    // the softmax's Σ_j P_j dP_j, with dP = dO Vᵀ, is dO · (Σ_j P_j V_j) = dO · O
    float L_i[R], D_i[R], dQ_i[R][W] = {};
    for (int r = 0; r < R; r++) {
        const int row = i * ROWS + row_of<R>(r), at = min(row, queries - 1);
        float part = 0;
        for (int d = lane() % LANES; d < DIM; d += LANES)
            part += to_float(dO[at * DIM + d]) * to_float(O[at * DIM + d]);
        D_i[r] = row_sum(part);
        L_i[r] = L[at];
        if (row < queries && lane() % LANES == 0) D[row] = D_i[r];
    }

    for (int n = first, turn = 0; n < end; n++, turn ^= 1) {
        wait_for_copies();
        __syncthreads();
        if (n + 1 < end) load_pair<COLS>(passing + (turn ^ 1) * PASSING, K, V, tiles[n + 1].number * COLS, keys);
        const Number *K_j = passing + turn * PASSING, *V_j = K_j + COLS * STRIDE;

        float P[R][C] = {}, dS[R][C] = {};  // S and dP = dO_i V_jᵀ at first
        multiply_transposed(P, Q_i, K_j);
        scale_and_mask(P, scale, bits, tiles[n]);
        multiply_transposed(dS, dO_i, V_j);
        for (int r = 0; r < R; r++)
            for (int c = 0; c < C; c++) {
                P[r][c] = exp2f(P[r][c] - L_i[r]);
                dS[r][c] = P[r][c] * (dS[r][c] - D_i[r]);
            }
        multiply_add(dQ_i, dS, K_j);
    }
    store_tile(dQ, dQ_i, scale, i * ROWS, queries);
}

// Runs after backward_q, which has written D. A tile of S is (keys, queries), as in flash.py.
template <int ROWS, int COLS> __global__ void __launch_bounds__(THREADS, 2)
    backward_kv(const Number* Q, const Number* K, const Number* V, const int* starts, const Tile* tiles,
                const unsigned* bits, int plans, int group, int queries, int keys, float scale, const Number* dO,
                const float* L, const float* D, Number* dK, Number* dV) {
    constexpr int R = ROWS * LANES / THREADS, C = COLS / LANES;
    const long long kv_head = blockIdx.z * gridDim.y + blockIdx.y, head = kv_head * group;  // the first that it serves
    Q += head * queries * DIM, dO += head * queries * DIM, L += head * queries, D += head * queries;
    K += kv_head * keys * DIM, V += kv_head * keys * DIM, dK += kv_head * keys * DIM, dV += kv_head * keys * DIM;

    const int j = blockIdx.x;
    starts += blockIdx.z % plans * gridDim.x + j;
    tiles += starts[0];
    const int count = starts[1] - starts[0], turns = group * count;  // one head after another

    Number* K_j = (Number*)((float*)shared + SCRATCH<ROWS, COLS>);
    Number *V_j = K_j + ROWS * STRIDE, *passing = V_j + ROWS * STRIDE;
    constexpr int PASSING = 2 * COLS * STRIDE + 2 * COLS * 4 / sizeof(Number);  // Q_i, dO_i, L_i and D_i
    auto load = [&](int turn) {
        const int i = tiles[turn % count].number;
        const long long start = turn / count * (long long)queries;
        Number* tile = passing + turn % 2 * PASSING;
        load_pair<COLS>(tile, Q + start * DIM, dO + start * DIM, i * COLS, queries);
        for (int n = threadIdx.x; n < 2 * COLS; n += THREADS) {
            const int row = i * COLS + n % COLS;
            const float* from = (n < COLS ? L : D) + start + (row < queries ? row : 0);
            copy_async<4>((float*)(tile + 2 * COLS * STRIDE) + n, from, row < queries);
        }
    };
    load_pair<ROWS>(K_j, K, V, j * ROWS, keys);
    if (turns > 0) load(0);

    float dK_j[R][W] = {}, dV_j[R][W] = {};
    for (int turn = 0; turn < turns; turn++) {
        wait_for_copies();
        __syncthreads();
        if (turn + 1 < turns) load(turn + 1);
        const Number *Q_i = passing + turn % 2 * PASSING, *dO_i = Q_i + COLS * STRIDE;
        const float *L_i = (const float*)(dO_i + COLS * STRIDE), *D_i = L_i + COLS;

        float P[R][C] = {}, dS[R][C] = {};
        multiply_transposed(P, K_j, Q_i);
        scale_and_mask(P, scale, bits, tiles[turn % count]);
        for (int c = 0; c < C; c++)
            for (int r = 0; r < R; r++) P[r][c] = exp2f(P[r][c] - L_i[column_of<SCORE_RUN>(c)]);
        multiply_add(dV_j, P, dO_i);
        multiply_transposed(dS, V_j, dO_i);
        for (int c = 0; c < C; c++)
            for (int r = 0; r < R; r++) dS[r][c] = P[r][c] * (dS[r][c] - D_i[column_of<SCORE_RUN>(c)]);
        multiply_add(dK_j, dS, Q_i);
    }
    store_tile(dK, dK_j, scale, j * ROWS, keys);
    store_tile(dV, dV_j, 1, j * ROWS, keys);
}
