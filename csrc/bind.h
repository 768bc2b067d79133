// Both Python modules take a Pointer as a Python int.
#pragma once
#include <pybind11/pybind11.h>

#include "pointer.h"

namespace py = pybind11;

namespace pybind11::detail {
template <>
struct type_caster<rlhf::Pointer> {
    PYBIND11_TYPE_CASTER(rlhf::Pointer, const_name("int"));
    bool load(handle source, bool) {
        if (!PyLong_Check(source.ptr())) return false;
        value.address = PyLong_AsSize_t(source.ptr());
        if (!PyErr_Occurred()) return true;
        PyErr_Clear();
        return false;
    }
};
}  // namespace pybind11::detail
