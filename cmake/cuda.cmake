# What a build with -DGGML_CUDA=ON needs beyond ggml's own CMake.

# Only ggml's pool in virtual memory calls the driver's library. Linked to it, the package would not even import on a
# machine without a driver; -DGGML_CUDA_NO_VMM=OFF links it all the same.
option(GGML_CUDA_NO_VMM "ggml: do not try to use CUDA VMM" ON)

find_package(CUDAToolkit REQUIRED)
set(CMAKE_INSTALL_RPATH_USE_LINK_PATH ON)

# A toolkit without cuBLAS: PyPI's nvidia-cublas, if this Python has it, brings headers and libraries. pip's isolated
# builds hide the packages of the Python that they run on, but not where they are.
if(NOT TARGET CUDA::cublas)
    set(major ${CUDAToolkit_VERSION_MAJOR})
    if(major LESS 13)
        set(wheel cublas)
    else()
        set(wheel cu${major})
    endif()
    execute_process(OUTPUT_VARIABLE folders COMMAND ${Python_EXECUTABLE} -c "
import importlib.util, sysconfig
found = importlib.util.find_spec('nvidia')
folders = [sysconfig.get_path('purelib') + '/nvidia', *(found.submodule_search_locations if found else [])]
print(*(folder + '/${wheel}' for folder in folders), sep=chr(59), end='')")
    set(find_in PATHS ${folders} NO_DEFAULT_PATH)
    find_path(LLAMACANCEL_CUBLAS_INCLUDE cublas_v2.h PATH_SUFFIXES include ${find_in})
    find_file(LLAMACANCEL_CUBLAS libcublas.so.${major} PATH_SUFFIXES lib ${find_in})
    find_file(LLAMACANCEL_CUBLASLT libcublasLt.so.${major} PATH_SUFFIXES lib ${find_in})
    if(NOT (LLAMACANCEL_CUBLAS_INCLUDE AND LLAMACANCEL_CUBLAS AND LLAMACANCEL_CUBLASLT))
        message(FATAL_ERROR "The CUDA toolkit in ${CUDAToolkit_LIBRARY_DIR} has no cuBLAS, and ${Python_EXECUTABLE} has no "
            "package that brings it. Try: pip install 'nvidia-cublas==${major}.${CUDAToolkit_VERSION_MINOR}.*'")
    endif()
    message(STATUS "llamacancel: cuBLAS of ${LLAMACANCEL_CUBLAS}")
    add_library(CUDA::cublasLt SHARED IMPORTED)
    set_target_properties(CUDA::cublasLt PROPERTIES IMPORTED_LOCATION ${LLAMACANCEL_CUBLASLT})
    add_library(CUDA::cublas SHARED IMPORTED)
    set_target_properties(CUDA::cublas PROPERTIES IMPORTED_LOCATION ${LLAMACANCEL_CUBLAS}
        INTERFACE_INCLUDE_DIRECTORIES ${LLAMACANCEL_CUBLAS_INCLUDE} INTERFACE_LINK_LIBRARIES CUDA::cublasLt)
    # Wherever both are installed, that package lies beside ours.
    list(APPEND CMAKE_INSTALL_RPATH "$ORIGIN/../nvidia/${wheel}/lib")
endif()
