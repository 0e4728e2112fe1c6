/* The transforms of Winograd's F(4x4, 3x3), which PyTorch's CPU kernels lack, and the gradients of PReLU, which they
   compute slowly. All arrays are float32 with channels last in memory; the number of channels is a multiple of 16 and
   at most MAX_CHANNELS. faces/cpu/kernels.py compiles this file and documents the functions. */

/* Vectors are as wide as the processor's: narrower ones take twice as long, and wider ones compile to code that is four
   times slower. */
#if defined __AVX512F__
enum { BYTES = 64 };
#elif defined __AVX__
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif
typedef float vector __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef int mask __attribute__((vector_size(BYTES)));
enum { LANES = BYTES / 4, MAX_CHANNELS = 4096 };    /* LANES floats fit into a vector */
static const float zeros[MAX_CHANNELS];             /* stands in for any pixel beyond the border */
#define AT(array, index) (*(vector *)((array) + (index)))
#define INLINE static inline __attribute__((always_inline))

INLINE vector prelu(vector x, vector slope) {
    const mask positive = x > 0;
    return (vector)(positive & (mask)x) + slope * (vector)(~positive & (mask)x);
}

/* The next three functions compute B'd, A e and A'v of faces/cpu/winograd.py for one row or column. The interpolation
   points are 0, P, -P, Q, -Q and infinity. The results at P and -P are the sum and the difference of the same even and
   odd parts, and so are those at Q and -Q. The factor 2 is 1 / P^2 = Q^2, 0.5 is its inverse, and 2.5 is P^2 + Q^2. */
static const float P = 0.70710678f, Q = 1.41421356f;

INLINE void input_transform(const vector d[6], vector v[6]) {
    const vector even_p = d[4] - 2 * d[2], odd_p = P * (d[3] - 2 * d[1]);
    const vector even_q = d[4] - 0.5f * d[2], odd_q = Q * (d[3] - 0.5f * d[1]);
    v[0] = d[0] - 2.5f * d[2] + d[4];
    v[1] = even_p + odd_p;
    v[2] = even_p - odd_p;
    v[3] = even_q + odd_q;
    v[4] = even_q - odd_q;
    v[5] = d[1] - 2.5f * d[3] + d[5];
}

INLINE void grad_output_transform(const vector e[4], vector v[6]) {
    const vector even_p = e[0] + 0.5f * e[2], odd_p = P * (e[1] + 0.5f * e[3]);
    const vector even_q = e[0] + 2 * e[2], odd_q = Q * (e[1] + 2 * e[3]);
    v[0] = e[0];
    v[1] = even_p + odd_p;
    v[2] = even_p - odd_p;
    v[3] = even_q + odd_q;
    v[4] = even_q - odd_q;
    v[5] = e[3];
}

INLINE void output_transform(const vector v[6], vector y[4]) {
    const vector even_p = v[1] + v[2], odd_p = P * (v[1] - v[2]);
    const vector even_q = v[3] + v[4], odd_q = Q * (v[3] - v[4]);
    y[0] = v[0] + even_p + even_q;
    y[1] = odd_p + odd_q;
    y[2] = 0.5f * even_p + 2 * even_q;
    y[3] = 0.5f * odd_p + 2 * odd_q + v[5];
}

/* Transform tile t of x, which has size x size pixels. The callers pass constants for size, offset and transform, so
   that the loops unroll after inlining. The loop over the tiles must stay in the callers: OpenMP moves its body into a
   function of its own before inlining, so the arguments would not be constants there. */
INLINE void transform_tile(const float *x, float *v, long t, long tiles, long h, long w, long c, const int size,
                           const int offset, void transform(const vector *, vector *)) {
    const long down = (h + 3) / 4, across = (w + 3) / 4;
    const long image = t / (down * across), top = t / across % down * 4 + offset, left = t % across * 4 + offset;
    const float *pixels[6][6];
    for (int i = 0; i < size; i++)
        for (int j = 0; j < size; j++) {
            const int inside = 0 <= left + j && left + j < w && 0 <= top + i && top + i < h;
            pixels[j][i] = inside ? x + ((image * h + top + i) * w + left + j) * c : zeros;
        }
    for (long k = 0; k < c; k += LANES) {
        vector rows[6][6];      /* the rows of the tile, once its columns are transformed */
        #pragma GCC unroll 6
        for (int j = 0; j < size; j++) {
            vector column[6], out[6];
            #pragma GCC unroll 6
            for (int i = 0; i < size; i++) column[i] = AT(pixels[j][i], k);
            transform(column, out);
            #pragma GCC unroll 6
            for (int a = 0; a < 6; a++) rows[a][j] = out[a];
        }
        #pragma GCC unroll 6
        for (int a = 0; a < 6; a++) {
            vector out[6];
            transform(rows[a], out);
            #pragma GCC unroll 6
            for (int b = 0; b < 6; b++) AT(v, ((a * 6 + b) * tiles + t) * c + k) = out[b];
        }
    }
}

/* v = B'd B for each tile d of 6x6 pixels of x, which starts one pixel above and to the left of its 4x4 outputs.
   x (n, h, w, c), 0 beyond the border; v (6, 6, tiles, c). */
void transform_input(const float *x, float *v, long n, long h, long w, long c, int threads) {
    const long tiles = n * ((h + 3) / 4) * ((w + 3) / 4);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < tiles; t++) transform_tile(x, v, t, tiles, h, w, c, 6, -1, input_transform);
}

/* v = A e A' for each tile e of 4x4 pixels of g, the gradient with respect to the output.
   g (n, h, w, c), 0 beyond the border; v (6, 6, tiles, c). */
void transform_grad_output(const float *g, float *v, long n, long h, long w, long c, int threads) {
    const long tiles = n * ((h + 3) / 4) * ((w + 3) / 4);
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < tiles; t++) transform_tile(g, v, t, tiles, h, w, c, 4, 0, grad_output_transform);
}

/* y = PReLU(bias + A'v A) for each tile. v (6, 6, tiles, c), bias and slope (c), y (n, h, w, c). */
void transform_output(float *v, float *bias, float *slope, float *y, long n, long h, long w, long c, int threads) {
    const long down = (h + 3) / 4, across = (w + 3) / 4, tiles = n * down * across;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < tiles; t++) {
        const long image = t / (down * across), top = t / across % down * 4, left = t % across * 4;
        for (long k = 0; k < c; k += LANES) {
            vector rows[4][6];  /* the rows of the tile, once its columns are transformed */
            for (int b = 0; b < 6; b++) {
                vector column[6], out[4];
                #pragma GCC unroll 6
                for (int a = 0; a < 6; a++) column[a] = AT(v, ((a * 6 + b) * tiles + t) * c + k);
                output_transform(column, out);
                #pragma GCC unroll 4
                for (int i = 0; i < 4; i++) rows[i][b] = out[i];
            }
            for (int i = 0; i < 4 && top + i < h; i++) {
                vector out[4];
                output_transform(rows[i], out);
                #pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
                    if (left + j < w) {
                        const vector value = AT(bias, k) + out[j];
                        AT(y, ((image * h + top + i) * w + left + j) * c + k) = prelu(value, AT(slope, k));
                    }
            }
        }
    }
}

/* Gradients of y = x > 0 ? x : slope x, given the gradient g with respect to y. g, x and grad_x (rows, c), slope (c),
   grad_slope (parts, c). The caller sums grad_slope over the parts. Rounding depends on the number of parts only, not
   on the number of threads. */
void prelu_gradients(float *g, float *x, float *slope, float *grad_x, float *grad_slope, long rows, long c, int parts,
                     int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < parts; part++) {
        vector sums[MAX_CHANNELS / LANES] = {{0}};
        for (long r = rows * part / parts; r < rows * (part + 1) / parts; r++)
            for (long k = 0; k < c; k += LANES) {
                const vector gradient = AT(g, r * c + k), value = AT(x, r * c + k);
                const mask positive = value > 0;
                const vector below = (vector)(~positive & (mask)gradient);
                AT(grad_x, r * c + k) = (vector)(positive & (mask)gradient) + AT(slope, k) * below;
                sums[k / LANES] += below * value;
            }
        for (long k = 0; k < c; k += LANES) AT(grad_slope, part * c + k) = sums[k / LANES];
    }
}
