// The Python face of csrc/: checks arguments, releases the GIL, calls one C++ function. Typed in fastdiff/_native.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "crc32c.hpp"
#include "permutation.hpp"
#include "row_gather.hpp"

namespace py = pybind11;

namespace {

using Int64Array = py::array_t<std::int64_t, py::array::c_style>;

constexpr std::uint64_t kMaxPermuted = std::uint64_t{1} << 62;

Int64Array permute(std::uint64_t n, std::uint64_t seed, std::uint64_t epoch, std::uint64_t start, std::uint64_t count) {
    if (n < 1 || n > kMaxPermuted) throw py::value_error("n must be from 1 to 2^62, got " + std::to_string(n));
    if (start > n || count > n - start)
        throw py::value_error("indices [" + std::to_string(start) + ", " + std::to_string(start) + " + " +
                              std::to_string(count) + ") reach past n = " + std::to_string(n));
    Int64Array out(static_cast<py::ssize_t>(count));
    std::int64_t* to = out.mutable_data();
    {
        py::gil_scoped_release unlocked;
        fastdiff::permute(fastdiff::Permutation(n, seed, epoch), start, static_cast<std::size_t>(count), to);
    }
    return out;
}

std::vector<fastdiff::Shard> make_shards(const Int64Array& fds, const Int64Array& offsets, const Int64Array& first_rows) {
    if (fds.ndim() != 1 || offsets.ndim() != 1 || first_rows.ndim() != 1 || offsets.size() != fds.size() ||
        first_rows.size() != fds.size() + 1)
        throw py::value_error("fds and offsets must be (S,) and first_rows (S + 1,), got " + std::to_string(fds.size()) +
                              ", " + std::to_string(offsets.size()) + " and " + std::to_string(first_rows.size()));
    std::vector<fastdiff::Shard> shards;
    for (py::ssize_t i = 0; i < fds.size(); ++i) {
        const std::int64_t first = first_rows.at(i), end = first_rows.at(i + 1);
        if (offsets.at(i) < 0 || end < first || (i == 0 && first != 0))
            throw py::value_error("shard " + std::to_string(i) + ": bad offset or first row");
        shards.push_back({static_cast<int>(fds.at(i)), static_cast<std::uint64_t>(offsets.at(i)), first, end});
    }
    return shards;
}

void gather_rows(const Int64Array& fds, const Int64Array& offsets, const Int64Array& first_rows, const Int64Array& rows,
                 py::array out, unsigned n_threads) {
    const std::vector<fastdiff::Shard> shards = make_shards(fds, offsets, first_rows);
    if (rows.ndim() != 1) throw py::value_error("rows must be 1-D, got " + std::to_string(rows.ndim()) + "-D");
    if (!(out.flags() & py::array::c_style) || !out.writeable())
        throw py::value_error("out must be C-contiguous and writeable");
    if (out.ndim() < 1 || out.shape(0) != rows.shape(0)) throw py::value_error("out.shape[0] must equal len(rows)");
    if (n_threads < 1) throw py::value_error("n_threads must be at least 1");
    const auto n_rows = static_cast<std::size_t>(rows.shape(0));
    if (n_rows == 0) return;
    const std::size_t row_bytes = static_cast<std::size_t>(out.nbytes()) / n_rows;
    auto* to = static_cast<std::byte*>(out.mutable_data());
    const std::int64_t* from = rows.data();
    py::gil_scoped_release unlocked;
    fastdiff::gather_rows(shards, row_bytes, from, n_rows, to, n_threads);
}

// The bytes of any C-contiguous array.
std::pair<const std::byte*, std::size_t> bytes_of(const py::array& data) {
    if (!(data.flags() & py::array::c_style)) throw py::value_error("data must be C-contiguous");
    return {static_cast<const std::byte*>(data.data()), static_cast<std::size_t>(data.nbytes())};
}

std::uint32_t crc32c(const py::array& data, std::uint32_t value, bool tables) {
    const auto [bytes, n_bytes] = bytes_of(data);
    py::gil_scoped_release unlocked;
    return fastdiff::crc32c(value, bytes, n_bytes, tables);
}

py::array_t<std::uint32_t> crc32c_blocks(const py::array& data, std::size_t block_bytes, bool tables) {
    const auto [bytes, n_bytes] = bytes_of(data);
    if (block_bytes < 1) throw py::value_error("block_bytes must be at least 1");
    py::array_t<std::uint32_t> out(static_cast<py::ssize_t>((n_bytes + block_bytes - 1) / block_bytes));
    std::uint32_t* to = out.mutable_data();
    {
        py::gil_scoped_release unlocked;
        fastdiff::crc32c_blocks(bytes, n_bytes, block_bytes, to, tables);
    }
    return out;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Compiled parts of fastdiff. Use them through fastdiff.store, not directly.";

    // Python builds the message, which needs the file's path; the arguments are the numbers.
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> read_error;
    read_error.call_once_and_store_result(
        [&m] { return py::object(py::exception<fastdiff::ReadError>(m, "ReadError")); });
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const fastdiff::ReadError& e) {
            const py::object args = py::make_tuple(e.what(), e.shard, e.offset, e.wanted, e.got, e.error);
            PyErr_SetObject(read_error.get_stored().ptr(), args.ptr());
        }
    });

    m.def("permute", &permute, py::arg("n"), py::arg("seed"), py::arg("epoch"), py::arg("start"), py::arg("count"),
          "Order v1 (csrc/permutation.hpp) of indices [start, start + count) of [0, n).");
    m.def("gather_rows", &gather_rows, py::arg("fds"), py::arg("offsets"), py::arg("first_rows"), py::arg("rows"),
          py::arg("out").noconvert(), py::kw_only(), py::arg("n_threads") = 1,
          "Read row rows[i] of the shards into out[i].");
    m.def("crc32c", &crc32c, py::arg("data"), py::arg("value") = 0, py::kw_only(), py::arg("tables") = false,
          "CRC-32C of an array's bytes, continuing from `value`.");
    m.def("crc32c_blocks", &crc32c_blocks, py::arg("data"), py::arg("block_bytes"), py::kw_only(),
          py::arg("tables") = false, "One CRC-32C per block of an array's bytes.");
    m.def("crc32c_has_hardware", &fastdiff::crc32c_has_hardware, "True if the processor has the crc32 instruction.");
}
