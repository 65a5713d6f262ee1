# llama.cpp as a static library, `llamacancel_llama`, with the backends that GGML_* options ask for.
#
#   -DLLAMACANCEL_LLAMA_DIR=DIR   build from this checkout instead of vendor/llama.cpp
#   -DGGML_NATIVE=OFF             portable code for the instruction sets that ggml's GGML_AVX2, ... name
#   -DGGML_CUDA=ON, -DGGML_METAL=ON, -DGGML_VULKAN=ON
#   -DGGML_RPC=OFF                without the devices of other processes and machines

set(LLAMACANCEL_LLAMA_DIR "" CACHE PATH "llama.cpp checkout to build from (empty: vendor/llama.cpp)")
set(llama_dir ${LLAMACANCEL_LLAMA_DIR})
if(NOT llama_dir)
    set(llama_dir ${CMAKE_CURRENT_SOURCE_DIR}/vendor/llama.cpp)
    execute_process(
        COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_SOURCE_DIR}/vendor/fetch.py --dest ${llama_dir}
        RESULT_VARIABLE fetched)
    if(NOT fetched EQUAL 0)
        message(FATAL_ERROR "llama.cpp could not be fetched; the lines above say why.")
    endif()
endif()
if(NOT EXISTS ${llama_dir}/include/llama.h)
    message(FATAL_ERROR "LLAMACANCEL_LLAMA_DIR=${llama_dir} holds no llama.cpp (include/llama.h is missing)")
endif()

set(BUILD_SHARED_LIBS OFF)
foreach(part COMMON TESTS TOOLS EXAMPLES SERVER APP)
    set(LLAMA_BUILD_${part} OFF CACHE BOOL "" FORCE)
endforeach()
set(LLAMA_OPENSSL OFF CACHE BOOL "" FORCE)
set(GGML_RPC ON CACHE BOOL "models split over worker processes")
set(GGML_RPC_RDMA OFF CACHE BOOL "RPC over RDMA, which needs libibverbs on every machine that runs the library")

# An assertion of ggml's that fails on our thread is turned into an exception (see _native/process/assertions.cpp),
# which has to pass through ggml's C frames.
if(NOT MSVC)
    add_compile_options($<$<COMPILE_LANGUAGE:C>:-fexceptions>)
endif()
if(GGML_CUDA)
    include(cmake/cuda.cmake)
endif()
add_subdirectory(${llama_dir} ${CMAKE_CURRENT_BINARY_DIR}/llama.cpp EXCLUDE_FROM_ALL)

add_library(llamacancel_llama INTERFACE)
target_link_libraries(llamacancel_llama INTERFACE llama)
# The guarded decode reads llama.cpp's memory classes, which its public header does not declare.
target_include_directories(llamacancel_llama SYSTEM INTERFACE ${llama_dir}/src)
# It shares the threads that ggml computes with (_native/process/team.hpp).
if(GGML_OPENMP)
    find_package(OpenMP COMPONENTS CXX)
    if(OpenMP_CXX_FOUND)
        target_link_libraries(llamacancel_llama INTERFACE OpenMP::OpenMP_CXX)
    endif()
endif()

# Chat: templates and parsers of llama.cpp's `common`, without the rest of it (see _native/chat/support.cpp). -O3 takes
# twice as long to compile and is no faster to use.
include(${llama_dir}/common/parsers/sources.cmake)
list(FILTER LLAMA_CHAT_PARSERS_SOURCES INCLUDE REGEX "\\.cpp$")
set(chat_sources chat chat-auto-parser-generator chat-auto-parser-helpers chat-diff-analyzer chat-peg-parser json json-schema
    peg-parser trie unicode jinja/caps jinja/lexer jinja/parser jinja/runtime jinja/string jinja/value)
list(TRANSFORM chat_sources PREPEND ${llama_dir}/common/)
list(TRANSFORM chat_sources APPEND .cpp)
add_library(llamacancel_chat OBJECT EXCLUDE_FROM_ALL ${LLAMA_CHAT_PARSERS_SOURCES} ${chat_sources})
set_source_files_properties(${chat_sources} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
set_target_properties(llamacancel_chat PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 0)
if(NOT MSVC AND NOT LLAMACANCEL_SANITIZE)
    target_compile_options(llamacancel_chat PRIVATE -O2)
endif()
target_include_directories(llamacancel_chat SYSTEM PUBLIC ${llama_dir}/common ${llama_dir}/vendor)
target_link_libraries(llamacancel_chat PUBLIC llama)

# With vendor/patches kernels look at the token inside a node, other backends than the CPU between pieces of a graph, and
# long loops while they work.
file(STRINGS ${llama_dir}/ggml/src/ggml-cpu/ggml-cpu-impl.h first_patch REGEX ggml_cpu_aborted)
file(STRINGS ${llama_dir}/common/peg-parser.h last_patch REGEX open_until)
if(first_patch AND last_patch)
    target_compile_definitions(llamacancel_llama INTERFACE LLAMACANCEL_PATCHED)
else()
    message(STATUS "llamacancel: ${llama_dir} is without (all of) vendor/patches; a cancel waits for the end of a graph node, on a GPU of a ubatch")
endif()
