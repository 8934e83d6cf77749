// Runs recorded calls of functions.h one after another: what a CUDA graph is on a GPU. A decode step
// makes some three hundred calls, and Python needs as long for one as a small matrix takes.
#include <utility>

#include "functions.h"

namespace pagewire {
namespace {

constexpr int64_t kWords = 24;  // arguments of a call, at most

// Call in native_recorder.py. An argument is a word: an address, an integer, or the bits of a float
// in the lower half.
struct Call {
    void (*run)(const int64_t* words);
    int64_t words[kWords];
};

template <typename T>
T argument(int64_t word) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(word);
    } else if constexpr (std::is_floating_point_v<T>) {
        const int32_t bits = static_cast<int32_t>(word);
        T value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    } else {
        return word;
    }
}

template <typename... Parameters, size_t... Index>
void call(void (*function)(Parameters...), const int64_t* words, std::index_sequence<Index...>) {
    static_assert(sizeof...(Parameters) <= kWords);
    function(argument<Parameters>(words[Index])...);
}

template <auto Function, typename... Parameters>
auto run_of(void (*)(Parameters...)) {
    return +[](const int64_t* words) {
        call(Function, words, std::index_sequence_for<Parameters...>{});
    };
}

struct Named {
    const char* name;
    void (*run)(const int64_t* words);
};

#define RECORDABLE(function) {#function, run_of<&function>(&function)}

const Named kRecordable[] = {
    RECORDABLE(quantize),        RECORDABLE(rms_norm),     RECORDABLE(add_rms_norm),
    RECORDABLE(silu_mul),        RECORDABLE(rope_and_store), RECORDABLE(paged_attention),
    RECORDABLE(linear_float),    RECORDABLE(linear_int8),  RECORDABLE(linear_int4),
};

}  // namespace
}  // namespace pagewire

using namespace pagewire;

// What a Call of the named function has to run, or null where it cannot be recorded.
PAGEWIRE_EXPORT void recordable(const char* name, void** run) {
    *run = nullptr;
    for (const Named& each : kRecordable)
        if (std::strcmp(each.name, name) == 0) *run = reinterpret_cast<void*>(each.run);
}

PAGEWIRE_EXPORT void replay(const void* calls, int64_t count) {
    const Call* each = static_cast<const Call*>(calls);
    for (int64_t i = 0; i < count; ++i) each[i].run(each[i].words);
}
