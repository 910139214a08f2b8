const assert = require("assert");
assert.equal(require("greeter")("test"), "hello test");
