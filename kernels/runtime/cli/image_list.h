/* Which images there are and what their outputs are called: the rules of cada_deploy/image_files.py. */
#ifndef CADA_SEG_CLI_IMAGE_LIST_H
#define CADA_SEG_CLI_IMAGE_LIST_H
#include <string>
#include <vector>

namespace cada::seg::cli {

struct ImageRef {
  std::string path, relative; /* relative names the output and orders the run */
};

/* The images of a folder, a list file or one image file, sorted by the bytes of `relative`. Throws
 * Failure: USAGE without any, FAILED for a folder that cannot be read (images would be missing). */
std::vector<ImageRef> find_images(const std::string &source);

/* The relative path without its image suffix: a/b.PNG -> a/b. */
std::string output_stem(const std::string &relative);

/* Throws Failure(USAGE) when two inputs would write one output. */
void check_output_names(const std::vector<ImageRef> &images);

/* Throws Failure(USAGE) when OUT is the input folder or lies in it. */
void check_out_not_inside(const std::string &source, const std::string &out);

} // namespace cada::seg::cli
#endif
