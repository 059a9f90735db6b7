// Memory for weights and caches: huge pages where the system gives them.
#pragma once

#include <cstddef>

namespace dejavu {

// Uninitialised memory, aligned to 64 bytes at least; pages that are never written are never backed.
// Throws std::bad_alloc.
void* allocate(size_t bytes);
void release(void* p, size_t bytes);

}  // namespace dejavu
