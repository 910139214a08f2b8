console.log(`user ${process.getuid()}`);
