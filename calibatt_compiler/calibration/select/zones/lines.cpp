// The dynamic programming of `lines.solve`, eight lines at a time; bit for bit what numpy gives.

#include <cstdint>
#include <limits>
#include <vector>

typedef double Reals __attribute__((vector_size(64)));
typedef int64_t Whole __attribute__((vector_size(64)));

constexpr int64_t LANES = 8;
constexpr int OCTAVES = 8;
constexpr double VARIANCE[OCTAVES] = {0, 1, 3, 7, 15, 31, 63, 127};
constexpr double RATE[OCTAVES] = {1, 1 / 2., 1 / 4., 1 / 8., 1 / 16., 1 / 32., 1 / 64., 1 / 128.};

// squares: (lines, places); blocks: (groups, width), width 1 or places, line l has row l % groups;
// leads: (lines). Results: octaves (lines, places); variance, kept, runs (lines).
extern "C" void solve(
    const double* squares, const double* blocks, const int64_t* leads, int64_t lines,
    int64_t places, int64_t groups, int64_t width, double price, double number, uint8_t* octaves,
    double* variance, double* kept, int64_t* runs) {
  std::vector<Reals> squared(places), counted(places);
  std::vector<Whole> best(places), goes_on(places);
  for (int64_t first = 0; first < lines; first += LANES) {
    Whole lead = {};
    for (int64_t lane = 0; lane < LANES; ++lane) {
      const int64_t line = first + lane < lines ? first + lane : lines - 1;
      const double* row = blocks + line % groups * width;
      lead[lane] = leads[line];
      for (int64_t place = 0; place < places; ++place) {
        squared[place][lane] = squares[line * places + place] / price;
        counted[place][lane] = row[width == 1 ? 0 : place];
      }
    }
    // In front of the first place nothing has begun: its run costs the same whatever its octave.
    Reals costs[OCTAVES] = {};
    for (int64_t place = 0; place < places; ++place) {
      if (place) {
        Reals least = costs[0];
        Whole which = {};
        for (int octave = 1; octave < OCTAVES; ++octave) {
          const Whole less = costs[octave] < least;
          least = less ? costs[octave] : least;
          which = less ? which * 0 + octave : which;
        }
        const Reals ends = least + number;
        Whole bits = {};
        for (int octave = 0; octave < OCTAVES; ++octave) {
          const Whole stays = costs[octave] <= ends;
          bits |= stays & (int64_t(1) << octave);
          costs[octave] = stays ? costs[octave] : ends;
        }
        best[place] = which;
        goes_on[place] = bits;
      }
      const Whole free = lead != place;
      for (int octave = 0; octave < OCTAVES; ++octave) {
        costs[octave] += squared[place] * VARIANCE[octave];
        costs[octave] += counted[place] * RATE[octave];
        if (octave)
          costs[octave] = free ? costs[octave] : Reals{} + std::numeric_limits<double>::infinity();
      }
    }
    for (int64_t lane = 0; lane < LANES && first + lane < lines; ++lane) {
      int64_t octave = 0;
      for (int other = 1; other < OCTAVES; ++other)
        if (costs[other][lane] < costs[octave][lane]) octave = other;
      uint8_t* chosen = octaves + (first + lane) * places;
      for (int64_t place = places - 1; place >= 0; --place) {
        chosen[place] = octave;
        if (place && !(goes_on[place][lane] >> octave & 1)) octave = best[place][lane];
      }
      double varies = 0, holds = 0;
      int64_t number_of = 1;
      for (int64_t place = 0; place < places; ++place) {
        varies += squared[place][lane] * VARIANCE[chosen[place]];
        holds += counted[place][lane] * RATE[chosen[place]];
        number_of += place && chosen[place] != chosen[place - 1];
      }
      variance[first + lane] = price * varies;
      kept[first + lane] = holds;
      runs[first + lane] = number_of;
    }
  }
}
