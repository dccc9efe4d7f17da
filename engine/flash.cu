// Transformers actuales: variantes de atención. flash_attention of attention.py on a GPU, under the same names.
//
// A block of threads keeps a tile of ROWS rows in shared memory while tiles of COLS rows pass by. What belongs to a
// pair of them, scores, p and dscores, is born and dies in the registers of the block's threads:
//
//     forward      queries stay, keys and values pass:  y = softmax(q kᵀ · scale) v
//     backward_q   queries stay, keys and values pass:  dq = Σ dscores k
//     backward_kv  keys and values stay, queries pass:  dv = Σ pᵀ dy,  dk = Σ dscoresᵀ q
//
// Each backward kernel computes p again, so that every sum has one owner: no atomics, and the same bits every time.
//
// The kernels are written once, over two products of tiles, a bᵀ and p b. These exist twice: in float32 on the
// ordinary cores, and, compiled with HALF, in float16 on the tensor cores with sums in float32. In both, a row of a
// product belongs to LANES neighbouring lanes of one warp, each of which holds 1/LANES of its columns, and a thread so
// holds a part of R rows, `float x[R][C]`: in the float32 forward pass, with tiles of 128 by 32, LANES is 8, R 8, C 4.
// The softmax along a row takes a few shuffles and no other warp. Loops over x have constant bounds: the compiler
// unrolls them, and x lies in registers.
//
// After FlashAttention-2 (Dao 2023), which sums dq up with atomics where here it has a kernel of its own.
//
// Compile-time: DIM, the size of a head (32, 64 or 128), and HALF or not. Nothing is included, so NVRTC needs no path.
// Arrays are contiguous: q, y, dy, dq (batch, heads, queries, DIM), k, v, dk, dv (batch, kv_heads, keys, DIM) and
// log_sum, along (batch, heads, queries), which are float32 always; log_sum is to base 2 here.

#ifdef HALF
typedef unsigned short Number;                        // the bits of a float16
constexpr int LANES = 4, SCORE_RUN = 2, OUT_RUN = 2;  // as the tensor cores lay out their results
#else
typedef float Number;
constexpr int LANES = 8, SCORE_RUN = 1, OUT_RUN = 4;  // outputs are read and written four at once
#endif
constexpr int WARPS = 4, THREADS = 32 * WARPS;

struct alignas(16) Quad {  // the most that one instruction moves between memory and a thread's registers
    float at[4];
};
extern __shared__ Quad shared[];

// 16 bytes between the rows of a tile shift the rows against the banks, so that eight read at once meet no bank twice.
constexpr int STRIDE = DIM + 16 / sizeof(Number);

// Scores are in units of log 2, as exp2f is one instruction. An unseen one gives exp2f(UNSEEN - m) = 0 for every m, as
// m starts at LOWEST; no infinity is ever subtracted from another.
constexpr float LOG2_E = 1.44269504f, UNSEEN = -3e38f, LOWEST = -1e38f;

// --- which element is whose ---

__device__ int lane() { return threadIdx.x % 32; }

// The row, in a tile of ROWS rows, of row i of this thread's grid
template <int ROWS>
__device__ int row_of(int i) {
    return threadIdx.x / 32 * (ROWS / WARPS) + 32 / LANES * i + lane() / LANES;
}

// The column of column j of this thread's grid: RUN neighbours are its own, the next RUN the next lane's
template <int RUN>
__device__ int column_of(int j) {
    return (j / RUN * LANES + lane() % LANES) * RUN + j % RUN;
}

__device__ float row_sum(float x) {
    for (int step = 1; step < LANES; step *= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

__device__ float row_max(float x) {
    for (int step = 1; step < LANES; step *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// --- instructions that have no name in C; tests/cuda_on_cpu.h says in C++ what they do ---

#ifndef ON_CPU
// Starts to copy BYTES from global to shared memory, past the registers. If not present: zeros, and nothing is read.
template <int BYTES>
__device__ void copy_async(void* to, const void* from, bool present) {
    const unsigned target = __cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :: "r"(target), "l"(from), "n"(BYTES), "r"(present ? BYTES : 0) : "memory");
}

// Waits for this thread's copies; a __syncthreads() after it, for everybody's.
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
template <bool TRANSPOSE>
__device__ void load_matrices(unsigned (&x)[4], const void* row) {
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

// --- tiles ---

// Starts to load rows first, first + 1, … of an array of `total` rows; those past its end become zeros. A thread's rows
// lie a constant apart, which costs no arithmetic.
template <int ROWS>
__device__ void load_tile(Number* tile, const Number* from, int first, int total) {
    constexpr int PART = 16 / sizeof(Number), PARTS = DIM / PART;
    const int start = threadIdx.x / PARTS, column = threadIdx.x % PARTS * PART;
    tile += start * STRIDE + column;
    from += (first + start) * DIM + column;
    for (int row = 0; row < ROWS; row += THREADS / PARTS)
        copy_async<16>(tile + row * STRIDE, from + row * DIM, first + start + row < total);
}

template <int ROWS>
__device__ void load_pair(Number* tiles, const Number* a, const Number* b, int first, int total) {
    load_tile<ROWS>(tiles, a, first, total);
    load_tile<ROWS>(tiles + ROWS * STRIDE, b, first, total);
}

// Writes x, a (ROWS, DIM) tile in the threads' registers, to the rows from `first` on of an array of `total` rows.
template <int ROWS, int R, int D>
__device__ void store_tile(Number* to, const float (&x)[R][D], int first, int total) {
    for (int i = 0; i < R; i++) {
        const int row = first + row_of<ROWS>(i);
        if (row >= total) continue;
        for (int j = 0; j < D; j += OUT_RUN) {
            Number* at = to + row * DIM + column_of<OUT_RUN>(j);
#ifdef HALF
            *(unsigned*)at = pack(x[i][j], x[i][j + 1]);
#else
            *(Quad*)at = {x[i][j], x[i][j + 1], x[i][j + 2], x[i][j + 3]};
#endif
        }
    }
}

#ifdef HALF

// A 16 × 16 part of a tile, its quarters in the order of mma's a: the left ones, upper and lower, then the right ones
template <bool TRANSPOSE>
__device__ void load_part(unsigned (&x)[4], const Number* corner) {
    load_matrices<TRANSPOSE>(x, corner + lane() % 16 * STRIDE + lane() / 16 * 8);
}

// s += a bᵀ for tiles a (ROWS, DIM) and b (COLS, DIM)
template <int ROWS, int R, int C>
__device__ void multiply_transposed(float (&s)[R][C], const Number* a, const Number* b) {
    a += threadIdx.x / 32 * (ROWS / WARPS) * STRIDE;
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

// o += p b for p (ROWS, COLS), in the threads' registers, and a tile b (COLS, DIM). A result of mma, rounded to
// float16, lies as its operand a must: p need not leave its thread.
template <int ROWS, int R, int C, int D>
__device__ void multiply_add(float (&o)[R][D], const float (&p)[R][C], const Number* b) {
    for (int c = 0; c < C; c += 4) {
        unsigned left[R / 2][4], right[4];
        for (int i = 0; i < R; i++)
            for (int n = 0; n < 2; n++) left[i / 2][i % 2 + 2 * n] = pack(p[i][c + 2 * n], p[i][c + 2 * n + 1]);
        for (int j = 0; j < D; j += 4) {
            load_part<true>(right, b + 4 * c * STRIDE + 4 * j);
            for (int i = 0; i < R; i += 2) {
                mma(&o[i][j], &o[i + 1][j], left[i / 2], right[0], right[1]);
                mma(&o[i][j + 2], &o[i + 1][j + 2], left[i / 2], right[2], right[3]);
            }
        }
    }
}

template <int ROWS, int COLS>
constexpr int SCRATCH = 0;

#else

// s += a bᵀ for tiles a (ROWS, DIM) and b (COLS, DIM). In each step of 4 in d, R + C quads that a thread reads serve 4 R C multiplications.
template <int ROWS, int R, int C>
__device__ void multiply_transposed(float (&s)[R][C], const Number* a, const Number* b) {
    a += row_of<ROWS>(0) * STRIDE;
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

// o += p b for p (ROWS, COLS), in the threads' registers, and a tile b (COLS, DIM). A thread needs its rows of p whole:
// each lane writes its share to shared memory and reads rows back, and as only its own warp is involved, __syncwarp is
// enough. 8 floats more per row put the 4 rows that a warp writes at once into different banks.
template <int ROWS, int R, int C, int D>
__device__ void multiply_add(float (&o)[R][D], const float (&p)[R][C], const Number* b) {
    constexpr int COLS = C * LANES, NEXT_ROW = 32 / LANES * (COLS + 8);
    float* left = (float*)shared + row_of<ROWS>(0) * (COLS + 8);
    b += column_of<OUT_RUN>(0);
    for (int i = 0; i < R; i++)
        for (int j = 0; j < C; j++) left[i * NEXT_ROW + column_of<SCORE_RUN>(j)] = p[i][j];
    __syncwarp();
#pragma unroll 2
    for (int c = 0; c < COLS; c += 4) {
        Quad rows[R];
        for (int i = 0; i < R; i++) rows[i] = *(const Quad*)(left + i * NEXT_ROW + c);
        for (int n = 0; n < 4; n++)
            for (int j = 0; j < D; j += 4) {
                const Quad right = *(const Quad*)(b + (c + n) * STRIDE + j * LANES);
                for (int i = 0; i < R; i++)
                    for (int x = 0; x < 4; x++) o[i][j + x] += rows[i].at[n] * right.at[x];
            }
    }
    __syncwarp();
}

template <int ROWS, int COLS>
constexpr int SCRATCH = ROWS * (COLS + 8);  // floats before the tiles, through which p goes

#endif

// --- the mask ---

// A query sees the keys less than `window` places before it and less than `ahead` places after it: none, if that is 1.
// Queries are counted along the keys, whose last they are; the first `first_key` keys are padding.
struct Mask {
    int first_key, keys, window, ahead;

    __device__ bool sees(int query, int key) const {
        return first_key <= key && key < keys && query < keys && query - key < window && key - query < ahead;
    }
};

// Scores of the tile of queries from `query` on and keys from `key` on: scaled, and UNSEEN where they are not seen
template <int ROWS, int COLS, bool KEYS_STAY, int R, int C>
__device__ void scale_and_mask(float (&s)[R][C], float scale, const Mask& mask, int query, int key) {
    for (int i = 0; i < R; i++)
        for (int j = 0; j < C; j++) s[i][j] *= scale * LOG2_E;
    // what is seen is a band along the diagonal: where the two corners off the diagonal are seen, all of the tile is
    const int last_query = query + (KEYS_STAY ? COLS : ROWS) - 1, last_key = key + (KEYS_STAY ? ROWS : COLS) - 1;
    if (mask.sees(last_query, key) && mask.sees(query, last_key)) return;
    for (int i = 0; i < R; i++)
        for (int j = 0; j < C; j++) {
            const int row = row_of<ROWS>(i), column = column_of<SCORE_RUN>(j);
            if (!mask.sees(query + (KEYS_STAY ? column : row), key + (KEYS_STAY ? row : column))) s[i][j] = UNSEEN;
        }
}

// --- the kernels: a block for each tile that stays (x), head (y) and row of the batch (z) ---

// The 2 of the launch bounds allows 255 registers: left alone, the compiler goes for three blocks at once, and spills.
template <int ROWS, int COLS>
__global__ void __launch_bounds__(THREADS, 2)
    forward(const Number* q, const Number* k, const Number* v, const int* first_key, int group, int queries, int keys,
            int window, int ahead, float scale, Number* y, float* log_sum) {
    constexpr int R = ROWS / WARPS * LANES / 32, C = COLS / LANES, D = DIM / LANES;
    const long long head = blockIdx.z * gridDim.y + blockIdx.y;  // counted through the batch
    q += head * queries * DIM, y += head * queries * DIM, log_sum += head * queries;
    k += head / group * keys * DIM, v += head / group * keys * DIM;

    const Mask mask = {first_key ? first_key[blockIdx.z] : 0, keys, window, ahead};
    const int rows = (gridDim.x - 1 - blockIdx.x) * ROWS;  // the last first: under a causal mask they take longest
    const int query = keys - queries + rows;
    const int first = max(mask.first_key, query - window + 1), last = min(keys, query + ROWS - 1 + ahead);

    Number* q_tile = (Number*)((float*)shared + SCRATCH<ROWS, COLS>);
    Number* passing = q_tile + ROWS * STRIDE;  // k and v twice: the tiles at work and those on their way
    constexpr int PASSING = 2 * COLS * STRIDE;
    load_tile<ROWS>(q_tile, q, rows, queries);
    if (first < last) load_pair<COLS>(passing, k, v, first, keys);

    float m[R], l[R] = {}, o[R][D] = {};
    for (int i = 0; i < R; i++) m[i] = LOWEST;
    for (int cols = first, turn = 0; cols < last; cols += COLS, turn ^= 1) {
        wait_for_copies();
        __syncthreads();  // this tile has come, and everybody is done with the last, whose place the next one takes
        if (cols + COLS < last) load_pair<COLS>(passing + (turn ^ 1) * PASSING, k, v, cols + COLS, keys);
        const Number *k_tile = passing + turn * PASSING, *v_tile = k_tile + COLS * STRIDE;

        float p[R][C] = {};
        multiply_transposed<ROWS>(p, q_tile, k_tile);
        scale_and_mask<ROWS, COLS, false>(p, scale, mask, query, cols);
        for (int i = 0; i < R; i++) {
            float larger = m[i];
            for (int j = 0; j < C; j++) larger = fmaxf(larger, p[i][j]);
            larger = row_max(larger);
            const float shrink = exp2f(m[i] - larger);
            l[i] *= shrink;  // of this lane's columns; the lanes are summed up at the end
            for (int j = 0; j < D; j++) o[i][j] *= shrink;
            for (int j = 0; j < C; j++) {
                p[i][j] = exp2f(p[i][j] - larger);
                l[i] += p[i][j];
            }
            m[i] = larger;
        }
        multiply_add<ROWS>(o, p, v_tile);
    }

    for (int i = 0; i < R; i++) {
        l[i] = row_sum(l[i]);
        if (l[i] == 0) l[i] = 1;  // a query that sees no key keeps o = 0
        for (int j = 0; j < D; j++) o[i][j] /= l[i];
        const int row = rows + row_of<ROWS>(i);
        if (row < queries && lane() % LANES == 0) log_sum[row] = m[i] + log2f(l[i]);
    }
    store_tile<ROWS>(y, o, rows, queries);
}

template <int ROWS, int COLS>
__global__ void __launch_bounds__(THREADS, 2)
    backward_q(const Number* q, const Number* k, const Number* v, const int* first_key, int group, int queries,
               int keys, int window, int ahead, float scale, const Number* y, const Number* dy, const float* log_sum,
               float* along, Number* dq) {
    constexpr int R = ROWS / WARPS * LANES / 32, C = COLS / LANES, D = DIM / LANES;
    const long long head = blockIdx.z * gridDim.y + blockIdx.y;
    q += head * queries * DIM, y += head * queries * DIM, dy += head * queries * DIM, dq += head * queries * DIM;
    k += head / group * keys * DIM, v += head / group * keys * DIM, log_sum += head * queries, along += head * queries;

    const Mask mask = {first_key ? first_key[blockIdx.z] : 0, keys, window, ahead};
    const int rows = (gridDim.x - 1 - blockIdx.x) * ROWS;
    const int query = keys - queries + rows;
    const int first = max(mask.first_key, query - window + 1), last = min(keys, query + ROWS - 1 + ahead);

    Number* q_tile = (Number*)((float*)shared + SCRATCH<ROWS, COLS>);
    Number *dy_tile = q_tile + ROWS * STRIDE, *passing = dy_tile + ROWS * STRIDE;
    constexpr int PASSING = 2 * COLS * STRIDE;
    load_pair<ROWS>(q_tile, q, dy, rows, queries);
    if (first < last) load_pair<COLS>(passing, k, v, first, keys);

    // the softmax's Σ_j dp_j p_j, with dp = dy vᵀ, is dy · (Σ_j p_j v_j) = dy · y
    float row_along[R], row_log_sum[R], dq_tile[R][D] = {};
    for (int i = 0; i < R; i++) {
        const int row = rows + row_of<ROWS>(i), at = min(row, queries - 1);
        float part = 0;
        for (int d = lane() % LANES; d < DIM; d += LANES)
            part += to_float(dy[at * DIM + d]) * to_float(y[at * DIM + d]);
        row_along[i] = row_sum(part);
        row_log_sum[i] = log_sum[at];
        if (row < queries && lane() % LANES == 0) along[row] = row_along[i];
    }

    for (int cols = first, turn = 0; cols < last; cols += COLS, turn ^= 1) {
        wait_for_copies();
        __syncthreads();
        if (cols + COLS < last) load_pair<COLS>(passing + (turn ^ 1) * PASSING, k, v, cols + COLS, keys);
        const Number *k_tile = passing + turn * PASSING, *v_tile = k_tile + COLS * STRIDE;

        float p[R][C] = {}, dscores[R][C] = {};
        multiply_transposed<ROWS>(p, q_tile, k_tile);
        scale_and_mask<ROWS, COLS, false>(p, scale, mask, query, cols);
        multiply_transposed<ROWS>(dscores, dy_tile, v_tile);
        for (int i = 0; i < R; i++)
            for (int j = 0; j < C; j++) {
                p[i][j] = exp2f(p[i][j] - row_log_sum[i]);
                dscores[i][j] = p[i][j] * (dscores[i][j] - row_along[i]);
            }
        multiply_add<ROWS>(dq_tile, dscores, k_tile);
    }

    for (int i = 0; i < R; i++)
        for (int j = 0; j < D; j++) dq_tile[i][j] *= scale;
    store_tile<ROWS>(dq, dq_tile, rows, queries);
}

// Runs after backward_q, which has written `along`. A tile of scores is (keys, queries), as in attention.py.
template <int ROWS, int COLS>
__global__ void __launch_bounds__(THREADS, 2)
    backward_kv(const Number* q, const Number* k, const Number* v, const int* first_key, int group, int queries,
                int keys, int window, int ahead, float scale, const Number* dy, const float* log_sum,
                const float* along, Number* dk, Number* dv) {
    constexpr int R = ROWS / WARPS * LANES / 32, C = COLS / LANES, D = DIM / LANES;
    const long long kv_head = blockIdx.z * gridDim.y + blockIdx.y, head = kv_head * group;  // the first that it serves
    q += head * queries * DIM, dy += head * queries * DIM, log_sum += head * queries, along += head * queries;
    k += kv_head * keys * DIM, v += kv_head * keys * DIM, dk += kv_head * keys * DIM, dv += kv_head * keys * DIM;

    const Mask mask = {first_key ? first_key[blockIdx.z] : 0, keys, window, ahead};
    const int cols = blockIdx.x * ROWS, offset = keys - queries;
    const int first = max(0, cols - ahead + 1 - offset);
    const int last = cols + ROWS <= mask.first_key ? 0 : min(queries, cols + ROWS - 1 + window - offset);
    const int tiles = max(0, last - first + COLS - 1) / COLS, turns = group * tiles;  // one head after another

    Number* k_tile = (Number*)((float*)shared + SCRATCH<ROWS, COLS>);
    Number *v_tile = k_tile + ROWS * STRIDE, *passing = v_tile + ROWS * STRIDE;
    constexpr int PASSING = 2 * COLS * STRIDE + 2 * COLS * 4 / sizeof(Number);  // q, dy, their log_sum and along
    auto load = [&](int turn) {
        const int rows = first + turn % tiles * COLS;
        const long long head_start = turn / tiles * (long long)queries;
        Number* tile = passing + turn % 2 * PASSING;
        load_pair<COLS>(tile, q + head_start * DIM, dy + head_start * DIM, rows, queries);
        for (int i = threadIdx.x; i < 2 * COLS; i += THREADS) {
            const int row = rows + i % COLS;
            const float* from = (i < COLS ? log_sum : along) + head_start + (row < queries ? row : 0);
            copy_async<4>((float*)(tile + 2 * COLS * STRIDE) + i, from, row < queries);
        }
    };
    load_pair<ROWS>(k_tile, k, v, cols, keys);
    if (turns > 0) load(0);

    float dk_tile[R][D] = {}, dv_tile[R][D] = {};
    for (int turn = 0; turn < turns; turn++) {
        wait_for_copies();
        __syncthreads();
        if (turn + 1 < turns) load(turn + 1);
        const Number *q_tile = passing + turn % 2 * PASSING, *dy_tile = q_tile + COLS * STRIDE;
        const float *col_log_sum = (const float*)(dy_tile + COLS * STRIDE), *col_along = col_log_sum + COLS;

        float p[R][C] = {}, dscores[R][C] = {};
        multiply_transposed<ROWS>(p, k_tile, q_tile);
        scale_and_mask<ROWS, COLS, true>(p, scale, mask, offset + first + turn % tiles * COLS, cols);
        for (int j = 0; j < C; j++)
            for (int i = 0; i < R; i++) p[i][j] = exp2f(p[i][j] - col_log_sum[column_of<SCORE_RUN>(j)]);
        multiply_add<ROWS>(dv_tile, p, dy_tile);
        multiply_transposed<ROWS>(dscores, v_tile, dy_tile);
        for (int j = 0; j < C; j++)
            for (int i = 0; i < R; i++) dscores[i][j] = p[i][j] * (dscores[i][j] - col_along[column_of<SCORE_RUN>(j)]);
        multiply_add<ROWS>(dk_tile, dscores, q_tile);
    }

    for (int i = 0; i < R; i++)
        for (int j = 0; j < D; j++) dk_tile[i][j] *= scale;
    store_tile<ROWS>(dk, dk_tile, cols, keys);
    store_tile<ROWS>(dv, dv_tile, cols, keys);
}
