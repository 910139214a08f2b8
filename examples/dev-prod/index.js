console.log(`running in ${process.env.NODE_ENV}`);
