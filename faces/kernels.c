/* What PyTorch's CPU kernels are slow at or don't have: the transforms of Winograd's F(4x4, 3x3) and the gradient of
   PReLU. float32, channels last in memory and a multiple of 16; faces/kernels.py compiles this file and says more. */

typedef float vector __attribute__((vector_size(64), aligned(4), may_alias));  /* 16 channels; smaller units halve it */
typedef int mask __attribute__((vector_size(64)));
enum { LANES = 16, MOST = 4096 / LANES };
#define AT(array, index) (*(vector *)((array) + (index)))

static inline __attribute__((always_inline)) vector dot(const float *row, const vector *column, int count) {
    vector sum = row[0] * column[0];
    for (int i = 1; i < count; i++) sum += row[i] * column[i];
    return sum;
}

static inline __attribute__((always_inline)) vector prelu(vector x, vector slope) {
    const mask positive = x > 0;
    return (vector)(positive & (mask)x) + slope * (vector)(~positive & (mask)x);
}

static inline __attribute__((always_inline)) void products(float *x, const float *m, float *v, long n, long h, long w,
                                                           long c, int threads, const int size, const int offset) {
    const long down = (h + 3) / 4, across = (w + 3) / 4, tiles = n * down * across;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < tiles; t++) {
        const long image = t / (down * across), top = t / across % down * 4 + offset, left = t % across * 4 + offset;
        for (long k = 0; k < c; k += LANES) {
            vector half[6][6];
            for (int j = 0; j < size; j++) {
                vector column[6] = {{0}};
                for (int i = 0; i < size; i++)
                    if (0 <= left + j && left + j < w && 0 <= top + i && top + i < h)
                        column[i] = AT(x, ((image * h + top + i) * w + left + j) * c + k);
                for (int a = 0; a < 6; a++) half[a][j] = dot(m + a * size, column, size);
            }
            for (int a = 0; a < 6; a++)
                for (int b = 0; b < 6; b++)
                    AT(v, ((a * 6 + b) * tiles + t) * c + k) = dot(m + b * size, half[a], size);
        }
    }
}

/* v[a, b] = sum of m[a][i] m[b][j] x[4 r + i + offset, 4 s + j + offset] over i and j, for every tile (image, r, s);
   x is 0 beyond its border. x (n, h, w, c); m (6, size): size 6 with offset -1, or 4 with 0; v (6, 6, tiles, c). */
void to_products(float *x, const float *m, float *v, long n, long h, long w, long c, int size, int threads) {
    if (size == 6) products(x, m, v, n, h, w, c, threads, 6, -1);
    else products(x, m, v, n, h, w, c, threads, 4, 0);
}

/* y[4 r + i, 4 s + j] = PReLU(bias + sum of m[i][a] m[j][b] v[a, b] over a and b). v (6, 6, tiles, c), m (4, 6), bias
   and slope (c), y (n, h, w, c). */
void to_outputs(float *v, const float *m, float *bias, float *slope, float *y, long n, long h, long w, long c,
                int threads) {
    const long down = (h + 3) / 4, across = (w + 3) / 4, tiles = n * down * across;
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < tiles; t++) {
        const long image = t / (down * across), top = t / across % down * 4, left = t % across * 4;
        for (long k = 0; k < c; k += LANES) {
            vector half[4][6];
            for (int b = 0; b < 6; b++) {
                vector column[6];
                for (int a = 0; a < 6; a++) column[a] = AT(v, ((a * 6 + b) * tiles + t) * c + k);
                for (int i = 0; i < 4; i++) half[i][b] = dot(m + i * 6, column, 6);
            }
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++)
                    if (top + i < h && left + j < w) {
                        const vector value = AT(bias, k) + dot(m + j * 6, half[i], 6);
                        AT(y, ((image * h + top + i) * w + left + j) * c + k) = prelu(value, AT(slope, k));
                    }
        }
    }
}

/* Gradients of y = x > 0 ? x : slope x. g, x, of_x (rows, c), slope (c), of_slope (parts, c), to be summed over the
   parts, whose number and not that of the threads decides how sums round. c is at most 4096. */
void prelu_gradients(float *g, float *x, float *slope, float *of_x, float *of_slope, long rows, long c, int parts,
                     int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int part = 0; part < parts; part++) {
        vector sums[MOST] = {{0}};
        for (long r = rows * part / parts; r < rows * (part + 1) / parts; r++)
            for (long k = 0; k < c; k += LANES) {
                const vector gradient = AT(g, r * c + k), value = AT(x, r * c + k);
                const mask positive = value > 0;
                const vector below = (vector)(~positive & (mask)gradient);
                AT(of_x, r * c + k) = (vector)(positive & (mask)gradient) + AT(slope, k) * below;
                sums[k / LANES] += below * value;
            }
        for (long k = 0; k < c; k += LANES) AT(of_slope, part * c + k) = sums[k / LANES];
    }
}
